"""The tree of known prefixes (Zheng et al., 2024, "RadixAttention"): from token ids to the blocks that hold their keys.

An edge is one block. A block that is not full is always a leaf, and a path that parts from another within a block has
a block of its own from there on, so nothing is ever split. Ownership: the tree is one holder of each of its blocks, a
row that uses one is another; only blocks that nobody else holds are evicted, leaves first, least recently used first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile

from specdec.paging.pool import BlockPool


@dataclass(frozen=True, slots=True)
class Match:
    """What the tree holds of a text: ``length`` leading tokens, in ``blocks``, the last of them perhaps in a part of one."""

    blocks: tuple[int, ...] = ()  # full ones
    partial: int | None = None  # holds the rest in its first slots
    length: int = 0


@dataclass(slots=True, eq=False)
class Edge:
    """A block below another, and all edges below it by their first token."""

    tokens: tuple[int, ...]  # at most a block's; fewer only in a leaf
    block: int
    parent: Edge | None
    last_use: int = 0
    children: dict[int, list[Edge]] = field(default_factory=dict)

    def below(self) -> Iterator[Edge]:
        """The edges that begin where this one ends."""
        for edges in self.children.values():
            yield from edges


def num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class PrefixTree:
    """Which prefixes are known, in blocks of ``pool``; it becomes the pool's ``reclaim``.

    Only what a target has verified belongs here (see ``BlockTables``): never nodes of a draft tree, a row's newest
    token, which has no keys yet, or what was accepted beyond the end of a row.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.num_blocks = 0
        self.num_tokens = 0
        self.num_evicted = 0
        self._root = Edge((), -1, None)
        self._clock = count(1)
        pool.reclaim = self.evict

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest prefix of ``tokens`` that is known, to the token. Its blocks are not held for the caller."""
        edge, blocks, now, size = self._root, list[int](), next(self._clock), self.pool.block_size
        while True:
            rest = tokens[len(blocks) * size : (len(blocks) + 1) * size]
            best, shared = self._nearest(edge, rest)
            if best is None:
                return Match(tuple(blocks), None, len(blocks) * size)
            best.last_use = now
            if shared < size:
                return Match(tuple(blocks), best.block, len(blocks) * size + shared)
            blocks.append(best.block)
            edge = best

    def insert(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Remember that ``blocks`` hold the keys of ``tokens``; what is known already stays in the blocks it is in."""
        edge, now, size = self._root, next(self._clock), self.pool.block_size
        for start in range(0, len(tokens), size):
            part = tuple(tokens[start : start + size])
            best, shared = self._nearest(edge, part)
            if best is not None and shared == len(part):  # known, or the beginning of what is
                best.last_use = now
                if len(best.tokens) > len(part):
                    return
                edge = best
                continue
            if best is not None and shared == len(best.tokens):  # what is known is the beginning of this
                self._remove(best)
            edge = self._add(edge, part, blocks[start // size], now)

    def evict(self, num_blocks: int) -> int:
        """Give up so many blocks, or as many as nobody else holds; how many are free by that."""
        leaves = [(edge.last_use, edge.block, edge) for edge in self._edges() if self._is_evictable(edge)]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < num_blocks:
            edge = heapq.heappop(leaves)[2]
            parent = edge.parent
            self._remove(edge)
            freed += 1
            if parent is not None and self._is_evictable(parent):
                heapq.heappush(leaves, (parent.last_use, parent.block, parent))
        self.num_evicted += freed
        return freed

    def clear(self) -> None:
        """Forget everything that no row holds."""
        self.evict(self.num_blocks)

    def paths(self) -> Iterator[tuple[int, ...]]:
        """The tokens of each path from the root to a leaf."""
        waiting: list[tuple[Edge, tuple[int, ...]]] = [(self._root, ())]
        while waiting:
            edge, before = waiting.pop()
            tokens = before + edge.tokens
            if not edge.children and tokens:
                yield tokens
            waiting.extend((child, tokens) for child in edge.below())

    @property
    def root(self) -> Edge:
        """Where all paths begin; it holds no block."""
        return self._root

    def _nearest(self, edge: Edge, tokens: Sequence[int]) -> tuple[Edge | None, int]:
        """The edge below ``edge`` that shares most leading tokens with ``tokens``, and how many these are."""
        best, most = None, 0
        for child in edge.children.get(tokens[0], ()) if tokens else ():
            shared = num_shared(child.tokens, tokens)
            if shared > most:
                best, most = child, shared
        return best, most

    def _add(self, parent: Edge, tokens: tuple[int, ...], block: int, now: int) -> Edge:
        edge = Edge(tokens, block, parent, now)
        parent.children.setdefault(tokens[0], []).append(edge)
        self.pool.hold([block])
        self.num_blocks += 1
        self.num_tokens += len(tokens)
        return edge

    def _remove(self, edge: Edge) -> None:
        assert edge.parent is not None
        siblings = edge.parent.children[edge.tokens[0]]
        siblings.remove(edge)
        if not siblings:
            del edge.parent.children[edge.tokens[0]]
        self.num_blocks -= 1
        self.num_tokens -= len(edge.tokens)
        self.pool.release([edge.block])

    def _is_evictable(self, edge: Edge) -> bool:
        return edge is not self._root and not edge.children and self.pool.num_holders(edge.block) == 1

    def _edges(self) -> Iterator[Edge]:
        waiting = [self._root]
        while waiting:
            edge = waiting.pop()
            yield edge
            waiting.extend(edge.below())
