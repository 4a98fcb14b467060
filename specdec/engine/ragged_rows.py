"""Which row owns which line of a ragged cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.engine.cache import Move, RaggedCache
from specdec.engine.layout import OpenRows
from specdec.engine.padded_pass import PaddedPass
from specdec.engine.passes import CacheRow, RowPass, grouped, in_order
from specdec.interfaces import Row


class RaggedRows(OpenRows[CacheRow]):
    """Rows in lines of ``cache``, one each; lines in use stay together."""

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__(cache)
        self._by_index: list[Row] = []

    def open(self, rows: Sequence[Row]) -> None:
        """Give each row a line behind those in use."""
        self.cache.reserve_rows(len(self._by_index) + len(rows))  # if there is no room, no row is open
        for row in rows:
            self._cache_rows[row] = CacheRow(len(self._by_index))
            self._by_index.append(row)

    def close(self, rows: Sequence[Row]) -> None:
        """Forget ``rows``; the last line moves into each gap. Rows that were never opened are ignored."""
        for row in rows:
            if row not in self._cache_rows:
                continue
            hole = self._cache_rows.pop(row).index
            last = self._by_index.pop()
            if last is not row:
                cache_row = self._cache_rows[last]
                self.cache.move_row(cache_row.index, hole, cache_row.length)
                cache_row.index = hole
                self._by_index[hole] = last

    def groups(self, row_passes: Sequence[RowPass]) -> list[list[int]]:
        """Which parts share a forward pass, each in the order of the cache's lines."""
        order = in_order(row_passes)
        runs = grouped([row_passes[i].cache_row.index for i in order], [len(row_passes[i].new_tokens) for i in order])
        return [order[run] for run in runs]

    def lay_out(self, row_passes: Sequence[RowPass], device: torch.device) -> PaddedPass:
        """Begin a pass over parts that stand in neighbouring lines."""
        layout = PaddedPass(row_passes, device)
        self.cache.begin_pass(row_passes[0].cache_row.index, layout.start, layout.width, layout.slots())
        return layout

    def keep(self, kept: Sequence[tuple[CacheRow, list[int]]]) -> None:
        """Make the slots of these nodes (ascending, root first) the next ones of their rows, and drop all others."""
        moves = [Move(row.index, row.length, path) for row, path in kept if path != list(range(len(path)))]
        for row, path in kept:
            row.length += len(path)
        self.cache.move_slots(moves)
