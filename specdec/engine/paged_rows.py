"""Rows of a model in pages: its cache for the block tables that it shares with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.engine.flat_pass import FlatPass
from specdec.engine.layout import OpenRows
from specdec.engine.padded_pass import PaddedPass
from specdec.engine.paged_cache import PagedCache
from specdec.engine.passes import CacheRow, RowPass
from specdec.interfaces import Row
from specdec.kernels.attention import MAX_AREA
from specdec.kernels.dispatch import choose
from specdec.paging.tables import BlockTables


@dataclass(slots=True)
class PagedRow(CacheRow):
    """A row, and the slots of the pool that it has."""

    row: Row = field(kw_only=True)


class PagedRows(OpenRows[PagedRow]):
    """The rows of one model or head.

    Args:
        tables: the blocks of all rows.
        num_layers: of the model.
        is_owner: whether rows get and lose their blocks here (the target); others fill buffers of their own for rows
            that the target has opened.
        must_follow: a head that computes slot t from what the target computes at slot t - 1 (EAGLE); it uses the
            slots from 1 on, so that each depends on nothing but the tokens up to its own.
        is_flat: rows stand one behind the other in a pass, which takes our attention; else side by side, and what they
            see is gathered.
        takes_pages: where our kernel runs, rows stand side by side and it reads their pages.
    """

    def __init__(
        self,
        tables: BlockTables,
        num_layers: int,
        *,
        is_owner: bool = False,
        must_follow: bool = False,
        is_flat: bool = True,
        takes_pages: bool = False,
    ) -> None:
        self.tables, self.must_follow = tables, must_follow
        self.is_flat, self._is_owner, self._offset = is_flat, is_owner, int(must_follow)
        size = tables.pool.block_size
        self._takes_pages = takes_pages and size & (size - 1) == 0
        super().__init__(PagedCache(num_layers, tables.pool.num_blocks * size, size))
        tables.add_store(self)

    def open(self, rows: Sequence[Row]) -> None:
        """Begin ``rows`` behind what is known of their texts, all of them or none.

        Raises:
            OutOfBlocksError: there is no room.
        """
        begun: list[Row] = []
        try:
            for row in rows:
                length = self.tables.open(row).num_cached if self._is_owner else self._num_filled(row)
                self._cache_rows[row] = PagedRow(0, length, row=row)
                begun.append(row)
        except MemoryError:
            self.close(begun)
            raise

    def close(self, rows: Sequence[Row]) -> None:
        """Forget ``rows``; what the target has verified of them may serve others. Unknown rows are ignored."""
        for row in rows:
            if row in self._cache_rows:
                if self._is_owner:
                    # What was accepted beyond the end is no text of this row; its newest token has no keys.
                    self.tables.close(row, min(self._cache_rows[row].length, len(row.tokens) - 1))
                else:
                    self.tables.note_filled(row)
                del self._cache_rows[row]

    def groups(self, row_passes: Sequence[RowPass]) -> list[list[int]]:
        """All parts share a pass."""
        return [list(range(len(row_passes)))] if row_passes else []

    def lay_out(self, row_passes: Sequence[RowPass], device: torch.device) -> FlatPass | PaddedPass:
        """Begin a pass.

        Raises:
            OutOfBlocksError: there is no room for its tokens.
        """
        ends = [row_pass.start + len(row_pass.new_tokens) for row_pass in row_passes]
        slots = [self._slots(row_pass.cache_row, end) for row_pass, end in zip(row_passes, ends, strict=True)]
        by_pages = self._takes_pages and self._can_read_pages(row_passes, device)
        if self.is_flat and not by_pages:
            flat = FlatPass(row_passes, slots, device)
            self.cache.begin_pass(flat.written, None, max(row_pass.start for row_pass in row_passes))
            return flat
        layout = PaddedPass(row_passes, device, self._pages(row_passes, device) if by_pages else None)
        write = np.full((len(slots), layout.num_columns), self.cache.num_slots)  # where padding goes
        for line, places, row_pass in zip(write, slots, row_passes, strict=True):
            line[layout.num_columns - len(row_pass.new_tokens) :] = places[row_pass.start :]
        read = None
        if not by_pages:
            padded = [np.pad(s, (0, layout.width - len(s)), constant_values=s[0]) for s in slots]
            read = torch.from_numpy(np.stack(padded)).to(device)
        self.cache.begin_pass(torch.from_numpy(write.ravel()).to(device), read, layout.start, by_pages)
        return layout

    def _can_read_pages(self, row_passes: Sequence[RowPass], device: torch.device) -> bool:
        """Whether the kernel runs here and takes what is new in this pass as the tree's area."""
        area = max(row_pass.start + len(row_pass.new_tokens) - row_pass.cache_row.length for row_pass in row_passes)
        return area <= MAX_AREA and choose("tree_attention", device) is not None

    def _pages(self, row_passes: Sequence[RowPass], device: torch.device) -> Tensor:
        """(B, any) int32 blocks of each row."""
        blocks = [self.tables[_paged(row_pass.cache_row).row].blocks for row_pass in row_passes]
        most = max(map(len, blocks))
        return torch.tensor(
            [each + each[-1:] * (most - len(each)) for each in blocks], dtype=torch.int32, device=device
        )

    def keep(self, kept: Sequence[tuple[CacheRow, list[int]]]) -> None:
        """Make the slots of these nodes (ascending, root first) the next ones of their rows, and drop all others."""
        sources: list[int] = []
        targets: list[int] = []
        for cache_row, path in kept:
            first = next((i for i, node in enumerate(path) if node != i), len(path))
            if first < len(path):
                places = self._slots(cache_row, cache_row.length + path[-1] + 1)[cache_row.length :]
                sources += places[path[first:]].tolist()
                targets += places[first : len(path)].tolist()
            cache_row.length += len(path)
        self.cache.copy(sources, targets)

    def num_kept(self, row: Row) -> int:
        """How many leading slots of ``row`` are filled with verified tokens; 0 if it is not open."""
        return self._cache_rows[row].length + self._offset if row in self._cache_rows else 0

    def copy_block(self, source: int, target: int, num_slots: int) -> None:
        """Copy the first slots of a block."""
        size, places = self.tables.pool.block_size, range(num_slots)
        self.cache.copy([source * size + i for i in places], [target * size + i for i in places])

    def _num_filled(self, row: Row) -> int:
        return self.tables[row].num_cached if self.must_follow else self.tables.num_filled(self, row)

    def _slots(self, cache_row: CacheRow, end: int) -> NDArray[np.int64]:
        """(end,) where the row's first slots are in the pool, with blocks for all of them."""
        row = _paged(cache_row).row
        self.tables.reserve(row, end + self._offset)
        return self.tables.slots(row, self._offset, end + self._offset)


def _paged(cache_row: CacheRow) -> PagedRow:
    assert isinstance(cache_row, PagedRow)
    return cache_row
