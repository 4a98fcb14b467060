"""The blocks of a paged key-value cache (Kwon et al., 2023, "PagedAttention"): which are free, and who holds the others.

A block is a number of slots, ``block_size`` of them, one token each. It may have several holders: rows with one prefix, and
the tree of known prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from specdec.errors import OutOfBlocksError


class BlockPool:
    """Counts the holders of ``num_blocks`` blocks; blocks are numbers from 0 on.

    A row's next block is the neighbour of its last one wherever that is free, and a row begins where most is free: so
    rows mostly lie in one piece, which a processor without page tables in its attention reads as it is.

    Args:
        num_blocks: how many there are.
        block_size: slots of each.
        reclaim: asked for this many blocks when none are free, before anybody is refused; it releases what it can.

    Raises:
        ValueError: fewer than one block, or a size below one.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, reclaim: Callable[[int], int] | None = None) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one slot, got {num_blocks} of {block_size}")
        self.num_blocks, self.block_size, self.reclaim = num_blocks, block_size, reclaim
        self.num_free = num_blocks
        self._counts: NDArray[np.int32] = np.zeros(num_blocks, dtype=np.int32)
        self._end_of = {0: num_blocks}  # free stretches by their first block: the block behind the last
        self._start_of = {num_blocks: 0}  # and the other way round

    @property
    def num_held(self) -> int:
        """Blocks with at least one holder."""
        return self.num_blocks - self.num_free

    def num_holders(self, block: int) -> int:
        """Of ``block``; 0: it is free."""
        return int(self._counts[block])

    def blocks_for(self, num_slots: int) -> int:
        """How many blocks hold ``num_slots`` slots."""
        return -(-num_slots // self.block_size)

    def make_room(self, num_blocks: int) -> bool:
        """Whether so many blocks are free, if need be after asking ``reclaim`` for them."""
        if num_blocks > self.num_free and self.reclaim is not None:
            self.reclaim(num_blocks - self.num_free)
        return num_blocks <= self.num_free

    def allocate(self, num_blocks: int, behind: int | None = None) -> list[int]:
        """So many blocks, each with one holder; the neighbours of block ``behind`` if they are free. All or none.

        Raises:
            OutOfBlocksError: there are not so many.
        """
        if not self.make_room(num_blocks):
            raise OutOfBlocksError(
                f"{num_blocks} blocks of the key-value cache are needed and {self.num_free} of {self.num_blocks} are "
                "free; give it more memory, or run fewer rows at a time"
            )
        blocks: list[int] = []
        for _ in range(num_blocks):
            behind = self._take(None if behind is None else behind + 1)
            blocks.append(behind)
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each of ``blocks``.

        Raises:
            ValueError: one of them is free.
        """
        for block in blocks:
            if self._counts[block] < 1:
                raise ValueError(f"block {block} is free: nobody can hold it without allocating it")
            self._counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder fewer for each of ``blocks``; without any it is free.

        Raises:
            ValueError: one of them is free already.
        """
        for block in blocks:
            if self._counts[block] < 1:
                raise ValueError(f"block {block} is free already")
            self._counts[block] -= 1
            if not self._counts[block]:
                self._put_back(block)

    def _take(self, wanted: int | None) -> int:
        """A free block: ``wanted`` if it begins a free stretch, else from the middle of the longest one."""
        if wanted is not None and wanted in self._end_of:
            start = block = wanted
        else:
            start = max(self._end_of, key=lambda first: self._end_of[first] - first)
            # Whoever ends where it starts goes on growing into its first half.
            block = start if start == 0 and self.num_free == self.num_blocks else (start + self._end_of[start]) // 2
        end = self._end_of.pop(start)
        del self._start_of[end]
        self._add_stretch(start, block)
        self._add_stretch(block + 1, end)
        self._counts[block] = 1
        self.num_free -= 1
        return block

    def _put_back(self, block: int) -> None:
        start, end = block, block + 1
        if block in self._start_of:
            start = self._start_of.pop(block)
            del self._end_of[start]
        if end in self._end_of:
            end = self._end_of.pop(end)
            del self._start_of[end]
        self._add_stretch(start, end)
        self.num_free += 1

    def _add_stretch(self, start: int, end: int) -> None:
        if start < end:
            self._end_of[start], self._start_of[end] = end, start
