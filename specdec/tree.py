"""Token trees: the one shape that every drafter proposes and every verifier checks.

Knows nothing of models, batches or sampling. Letters for shapes: n nodes of one tree, V vocabulary,
m rows of draft probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Draw(StrEnum):
    """How the nodes that name a row of ``draft_probs`` as their source were drawn from it."""

    INDEPENDENT = "independent"  # each on its own, with replacement
    WITHOUT_REPLACEMENT = "without_replacement"  # one after another, each from what the elder ones left


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Candidate continuations of one row.

    Node 0 is the root: the newest token of the row, which the target has not seen yet. A chain is a tree of
    width one; plain decoding is a tree of one node. Siblings are verified in their order. Each was either picked with
    certainty (n-grams, top-k, argmax, or noise that the verifier shares) or drawn from a row of ``draft_probs``; both
    kinds mix freely below one parent. Structure lives on the host as tuples of ints (walks, masks and traces need it
    there and never sync); only ``draft_probs`` is a tensor, on whatever device drafted it.

    Raises:
        ValueError: parents do not form a tree in topological order, or the draws do not fit ``draft_probs``.
    """

    tokens: tuple[int, ...]  # (n,)
    parents: tuple[int, ...]  # (n,)  parents[0] == -1, else 0 <= parents[i] < i
    sources: tuple[
        int, ...
    ] = ()  # (n,) the row of draft_probs that node i was drawn from, -1: certain; (): all certain
    draft_probs: Tensor | None = None  # (m, V) what nodes were drawn from, before any of their siblings was
    draws: tuple[Draw, ...] = ()  # (m,) how
    estimates: tuple[float, ...] = ()  # (n,) the drafter's guess that a node is accepted, 1 at the root; (): no guess

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if n == 0 or len(self.parents) != n:
            raise ValueError(f"a tree needs one parent for each token, got {n} tokens and {len(self.parents)} parents")
        if self.parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(self.parents[1:], 1)):
            raise ValueError(f"parents[0] must be -1 and 0 <= parents[i] < i for the rest, got {self.parents}")
        if self.sources or self.draws or self.draft_probs is not None:
            self._check_sources()
        self._check_siblings()

    def _check_sources(self) -> None:
        rows = len(self.draws)
        if self.draft_probs is None or self.draft_probs.dim() != 2 or self.draft_probs.shape[0] != rows:
            raise ValueError(
                f"drawn nodes need draft_probs of shape (m, V) and a draw for each of the m rows, got {rows} draws"
            )
        if len(self.sources) != len(self.tokens) or any(not -1 <= s < rows for s in self.sources):
            raise ValueError(
                f"sources must name one of the {rows} rows of draft_probs, or -1, for each node, got {self.sources}"
            )
        parents_of: dict[int, int] = {}
        for parent, source in zip(self.parents[1:], self.sources[1:], strict=True):
            if source >= 0 and parents_of.setdefault(source, parent) != parent:
                raise ValueError(
                    f"a row of draft_probs belongs to the children of one node, got row {source} under several"
                )

    def _check_siblings(self) -> None:
        seen: set[tuple[int, int, int]] = set()
        for node, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True)):
            source = self.source(node)
            key = (parent, token, source)
            if key in seen and (source < 0 or self.draws[source] is not Draw.INDEPENDENT):
                raise ValueError(
                    "siblings of one source must hold different tokens unless drawn independently, "
                    f"got tokens {self.tokens} under parents {self.parents}"
                )
            seen.add(key)

    @classmethod
    def root(cls, token: int) -> TokenTree:
        """The tree of plain decoding: one node."""
        return cls((token,), (-1,))

    @classmethod
    def chain(cls, root: int, tokens: Iterable[int], draft_probs: Tensor | None = None) -> TokenTree:
        """A chain below ``root``; ``draft_probs`` (g, V): row i is what ``tokens[i]`` was drawn from."""
        nodes = (root, *tokens)
        parents = tuple(range(-1, len(nodes) - 1))
        if draft_probs is None or len(nodes) == 1:
            return cls(nodes, parents)
        return cls(nodes, parents, parents, draft_probs, (Draw.INDEPENDENT,) * len(draft_probs))

    def source(self, node: int) -> int:
        """The row of ``draft_probs`` that ``node`` was drawn from, -1 if it was picked with certainty."""
        return self.sources[node] if self.sources else -1

    @property
    def drawn(self) -> frozenset[Draw]:
        """The kinds of draws in the tree; empty if every node was picked with certainty."""
        return frozenset(self.draws[source] for source in self.sources[1:] if source >= 0)

    @property
    def is_certain(self) -> bool:
        """Whether every node was picked with certainty."""
        return not self.drawn

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every node has at most one child."""
        return all(p == i - 1 for i, p in enumerate(self.parents))

    def children(self) -> list[list[int]]:
        """(n,) lists of child nodes, in draw order."""
        below: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            below[parent].append(node)
        return below

    def depths(self) -> list[int]:
        """(n,) edges between the root and each node."""
        depth = [0] * len(self.parents)
        for node, parent in enumerate(self.parents[1:], 1):
            depth[node] = depth[parent] + 1
        return depth

    def path(self, node: int) -> list[int]:
        """Nodes from the root down to ``node``, both included."""
        up = []
        while node >= 0:
            up.append(node)
            node = self.parents[node]
        return up[::-1]

    def path_tokens(self, node: int) -> list[int]:
        """Tokens of ``path(node)`` without the root's."""
        return [self.tokens[i] for i in self.path(node)[1:]]

    def compact(self) -> tuple[TokenTree, list[int]]:
        """The tree with nodes of equal path united, without its draws, and (n,) where each node went.

        Independent draws and merged trees can hold siblings with the same token; the target's distribution is the
        same at both, so one of them is scored.
        """
        place: dict[tuple[int, int], int] = {}
        where: list[int] = []
        for parent, token in zip(self.parents, self.tokens, strict=True):
            key = (where[parent] if parent >= 0 else -1, token)
            where.append(place.setdefault(key, len(place)))
        if len(place) == len(where):
            return self, where
        return TokenTree(tuple(token for _, token in place), tuple(parent for parent, _ in place)), where

    def ancestors(self) -> NDArray[np.bool_]:
        """(n, n) matrix: entry [i, j] says whether j is i or one of its ancestors."""
        return ancestor_matrix(self.parents)


def ancestor_matrix(parents: Sequence[int]) -> NDArray[np.bool_]:
    """(n, n) matrix of ``parents`` (n,): entry [i, j] says whether j is i or one of its ancestors."""
    seen = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def best_part(tree: TokenTree, values: Sequence[float], num_nodes: int) -> TokenTree:
    """The ``num_nodes`` nodes of highest value below the root, of a tree picked with certainty.

    ``values`` (n,) must not grow from a parent to its child. Dropping a drawn node for its own probability would not
    be exact, so trees with drawn nodes are refused.
    """
    if not tree.is_certain:
        raise ValueError("only trees picked with certainty can be cut by value")
    if len(tree) - 1 <= num_nodes:
        return tree
    ranked = sorted(range(1, len(tree)), key=lambda node: (-values[node], node))
    nodes = [0, *sorted(ranked[:num_nodes])]
    place = {node: i for i, node in enumerate(nodes)}
    return TokenTree(
        tuple(tree.tokens[node] for node in nodes),
        tuple(place.get(tree.parents[node], -1) for node in nodes),
        estimates=tuple(tree.estimates[node] for node in nodes) if tree.estimates else (),
    )
