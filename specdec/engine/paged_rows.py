"""Rows of a model in pages: its cache for the block tables that it shares with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.engine.flat_pass import FlatPass
from specdec.engine.padded_pass import PaddedPass
from specdec.engine.paged_cache import PagedCache
from specdec.engine.passes import CacheRow, RowPass
from specdec.interfaces import Row
from specdec.paging.tables import BlockTables


@dataclass(slots=True)
class PagedRow(CacheRow):
    """A row, and the slots of the pool that it has."""

    row: Row = field(kw_only=True)


class PagedRows:
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
    """

    def __init__(
        self,
        tables: BlockTables,
        num_layers: int,
        *,
        is_owner: bool = False,
        must_follow: bool = False,
        is_flat: bool = True,
    ) -> None:
        self.tables, self.must_follow = tables, must_follow
        self.is_flat, self._is_owner, self._offset = is_flat, is_owner, int(must_follow)
        self.cache = PagedCache(num_layers, tables.pool.num_blocks * tables.pool.block_size)
        self._cache_rows: dict[Row, PagedRow] = {}
        tables.add_store(self)

    def __getitem__(self, row: Row) -> PagedRow:
        return self._cache_rows[row]

    def __contains__(self, row: Row) -> bool:
        return row in self._cache_rows

    def __len__(self) -> int:
        return len(self._cache_rows)

    @property
    def past_key_values(self) -> Any:
        """The cache as a transformers model takes it."""
        return self.cache.past_key_values

    def layer(self, index: int) -> Any:
        """The cache of one layer, with ``update`` as in transformers."""
        return self.cache.layers[index]

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
        if self.is_flat:
            flat = FlatPass(row_passes, slots, device)
            self.cache.begin_pass(flat.written, None, max(row_pass.start for row_pass in row_passes))
            return flat
        layout = PaddedPass(row_passes, device)
        write = np.full((len(slots), layout.num_columns), self.cache.num_slots)  # where padding goes
        read = np.stack([np.pad(s, (0, layout.width - len(s)), constant_values=s[0]) for s in slots])
        for line, places, row_pass in zip(write, slots, row_passes, strict=True):
            line[layout.num_columns - len(row_pass.new_tokens) :] = places[row_pass.start :]
        write_slots, read_slots = (torch.from_numpy(each).to(device) for each in (write.ravel(), read))
        self.cache.begin_pass(write_slots, read_slots, layout.start)
        return layout

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
        assert isinstance(cache_row, PagedRow)
        self.tables.reserve(cache_row.row, end + self._offset)
        return self.tables.slots(cache_row.row, self._offset, end + self._offset)
