"""The blocks of each row, shared by everything that keeps keys and values for it: the target, draft models, heads.

One table serves all of them: slot t of a row is in the same block for each, in buffers of its own. A prefix is known
for all at once, and how much of a block a draft model has filled is counted beside it, because it may lag behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.interfaces import Row
from specdec.paging.pool import BlockPool
from specdec.paging.prefixes import Match, PrefixTree


class Store(Protocol):
    """Who keeps keys and values in the blocks of a table."""

    @property
    def must_follow(self) -> bool:
        """Whether what it fills slot t with is computed from what the target computes at slot t - 1."""

    def num_kept(self, row: Row) -> int:
        """How many leading slots of ``row`` it has filled with verified tokens; 0 if it does not know the row."""

    def copy_block(self, source: int, target: int, num_slots: int) -> None:
        """Copy the first slots of a block."""


@dataclass(slots=True, eq=False)
class BlockTable:
    """Where a row's slots are."""

    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0  # slots that came filled from the tree of prefixes, where the target goes on
    num_shared: int = 0  # leading blocks that were or are in the tree


class BlockTables:
    """The tables of all rows, in blocks of ``pool``; with ``tree``, prefixes are shared and remembered."""

    def __init__(self, pool: BlockPool, tree: PrefixTree | None = None) -> None:
        self.pool, self.tree = pool, tree
        self._tables: dict[Row, BlockTable] = {}
        self._filled: dict[Store, NDArray[np.int32]] = {}  # of each block, how many leading slots

    def __getitem__(self, row: Row) -> BlockTable:
        return self._tables[row]

    def __contains__(self, row: Row) -> bool:
        return row in self._tables

    def add_store(self, store: Store) -> None:
        """Let ``store`` keep keys and values for all rows to come."""
        self._filled[store] = np.zeros(self.pool.num_blocks, dtype=np.int32)

    @property
    def num_slots(self) -> int:
        """Slots in blocks that somebody holds."""
        return self.pool.num_held * self.pool.block_size

    def num_known(self, tokens: Sequence[int]) -> int:
        """How many leading ``tokens`` the tree of prefixes holds."""
        return 0 if self.tree is None else self.tree.match(tokens).length

    def open(self, row: Row) -> BlockTable:
        """A table for ``row`` that begins with what is known of its text, but for the newest token.

        Full blocks are shared; of a partly used one the row gets a copy, so it never writes where others read. Where a
        store must follow the target, it has to have filled all of that, and the target computes the last slot anew.

        Raises:
            OutOfBlocksError: there is no block for the copy; the row is not open then.
        """
        match = Match() if self.tree is None else self.tree.match(row.tokens[:-1])
        known = [*match.blocks, *(() if match.partial is None else (match.partial,))]
        followers = [filled for store, filled in self._filled.items() if store.must_follow]
        length = min([match.length, *(self._leading(filled, known) for filled in followers)])
        start = max(length - bool(followers), 0)  # from here on the row writes
        num_shared, size = start // self.pool.block_size, self.pool.block_size
        shared, rest = known[:num_shared], length - num_shared * size
        used = known[: num_shared + bool(rest)]
        self.pool.hold(used)  # the one that is copied, too, while room is made for the copy
        try:
            copied = self._allocate(1, shared[-1] if shared else None) if rest else []
        except MemoryError:
            self.pool.release(used)
            raise
        if rest:
            for store, filled in self._filled.items():
                store.copy_block(used[-1], copied[0], rest)
                filled[copied[0]] = min(filled[used[-1]], rest)
            self.pool.release(used[-1:])
        self._tables[row] = table = BlockTable(shared + copied, start, num_shared)
        return table

    def reserve(self, row: Row, num_slots: int) -> None:
        """See that ``row`` has at least ``num_slots`` slots.

        Raises:
            OutOfBlocksError: there are not so many; nothing has changed then.
        """
        table = self._tables[row]
        missing = self.pool.blocks_for(num_slots) - len(table.blocks)
        if missing > 0:
            table.blocks += self._allocate(missing, table.blocks[-1] if table.blocks else None)

    def trim(self, row: Row, num_slots: int) -> None:
        """Give back the blocks of ``row`` behind its first ``num_slots`` slots."""
        table = self._tables[row]
        needed = self.pool.blocks_for(num_slots)
        self.pool.release(table.blocks[needed:])
        del table.blocks[needed:]

    def share(self, row: Row, length: int) -> None:
        """Let others use what ``row`` has filled of its first ``length`` tokens, in full blocks; it goes on behind them."""
        table, size = self._tables[row], self.pool.block_size
        num_full = min(length // size, len(table.blocks))
        self.note_filled(row)
        if self.tree is not None and num_full > table.num_shared:
            self.tree.insert(row.tokens[: num_full * size], table.blocks)
            table.num_shared = num_full

    def close(self, row: Row, length: int) -> None:
        """Forget ``row``; the tree of prefixes keeps its first ``length`` tokens, to the token."""
        table = self._tables[row]
        self.note_filled(row)
        del self._tables[row]
        if self.tree is not None and length > 0:
            self.tree.insert(row.tokens[:length], table.blocks)
        self.pool.release(table.blocks)

    def num_filled(self, store: Store, row: Row) -> int:
        """How many leading slots of a row that was just opened ``store`` finds filled, up to where the target goes on."""
        table = self._tables[row]
        return min(self._leading(self._filled[store], table.blocks), table.num_cached)

    def slots(self, row: Row, first: int, last: int) -> NDArray[np.int64]:
        """Where slots ``first`` to ``last`` (exclusive) of ``row`` are among all slots of the pool."""
        size = self.pool.block_size
        begin = first // size
        blocks = np.asarray(self._tables[row].blocks[begin : -(-last // size)], dtype=np.int64)
        places = (blocks[:, None] * size + np.arange(size)).ravel()
        return places[first - begin * size : last - begin * size]

    def _allocate(self, num_blocks: int, behind: int | None) -> list[int]:
        blocks = self.pool.allocate(num_blocks, behind)
        for filled in self._filled.values():
            filled[blocks] = 0
        return blocks

    def _leading(self, filled: NDArray[np.int32], blocks: Sequence[int]) -> int:
        """How many leading slots of ``blocks`` are filled without a gap."""
        counts = filled[list(blocks)]
        partial = np.flatnonzero(counts < self.pool.block_size)
        if not len(partial):
            return len(blocks) * self.pool.block_size
        return int(partial[0]) * self.pool.block_size + int(counts[partial[0]])

    def note_filled(self, row: Row) -> None:
        """Remember what each store has filled of the blocks of ``row``."""
        table = self._tables[row]
        firsts = np.arange(len(table.blocks)) * self.pool.block_size
        for store, filled in self._filled.items():
            counts = np.clip(store.num_kept(row) - firsts, 0, self.pool.block_size)
            filled[table.blocks] = np.maximum(filled[table.blocks], counts)
