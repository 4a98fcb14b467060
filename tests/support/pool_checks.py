"""What is true of a pool of blocks at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from specdec.paging.pool import BlockPool
from specdec.paging.prefixes import PrefixTree


def check_pool(pool: BlockPool, tables: Iterable[Iterable[int]], tree: PrefixTree | None = None) -> None:
    """Free and held blocks are all there is, each holder counts once, and free stretches are whole and apart."""
    holders = Counter(block for blocks in tables for block in blocks)
    if tree is not None:
        waiting = [tree.root]
        edges = []
        while waiting:
            waiting.extend(below := list(waiting.pop().below()))
            edges += below
        holders.update(edge.block for edge in edges)
        assert len(edges) == tree.num_blocks
        assert sum(len(edge.tokens) for edge in edges) == tree.num_tokens
        assert all(len(edge.tokens) == pool.block_size or not edge.children for edge in edges)
    assert [pool.num_holders(b) for b in range(pool.num_blocks)] == [holders[b] for b in range(pool.num_blocks)]
    free = {b for b in range(pool.num_blocks) if not holders[b]}
    assert pool.num_free == len(free)
    assert pool.num_free + pool.num_held == pool.num_blocks
    stretches = sorted(pool._end_of.items())
    assert {b for start, end in stretches for b in range(start, end)} == free
    assert all(end < start for (_, end), (start, _) in pairwise(stretches))
    assert {end: start for start, end in stretches} == pool._start_of
