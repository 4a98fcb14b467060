"""Token trees: the one shape that every drafter proposes and every verifier checks.

Knows nothing of models, batches or sampling. Letters for shapes: n nodes of one tree, V vocabulary,
m rows of draft probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Draw(StrEnum):
    """How the children of a tree's nodes were chosen: this decides which rule may verify the tree."""

    CERTAIN = "certain"  # picked without randomness (n-grams, top-k, argmax), or with noise the verifier never uses
    INDEPENDENT = "independent"  # each drawn from its row of draft_probs, with replacement
    WITHOUT_REPLACEMENT = "without_replacement"  # drawn one after another from draft_probs without those before
    TOP_PLUS_ONE = "top_plus_one"  # the top k - 1 of draft_probs, then one drawn from the rest


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Candidate continuations of one row.

    Node 0 is the root: the newest token of the row, which the target has not seen yet. A chain is a tree of
    width one; plain decoding is a tree of one node. Siblings stand in the order in which they were drawn.
    Structure lives on the host as tuples of ints (walks, masks and traces need it there and never sync);
    only ``draft_probs`` is a tensor, on whatever device drafted it.

    Raises:
        ValueError: parents do not form a tree in topological order, or the draws do not fit ``draft_probs``.
    """

    tokens: tuple[int, ...]  # (n,)
    parents: tuple[int, ...]  # (n,)  parents[0] == -1, else 0 <= parents[i] < i
    draw: Draw = Draw.CERTAIN
    draft_probs: Tensor | None = None  # (m, V) distributions that nodes were drawn from; None if draw is certain
    sources: tuple[int, ...] = ()  # (n,) the row of draft_probs that node i was drawn from; -1 for the root

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if n == 0 or len(self.parents) != n:
            raise ValueError(
                f"a tree needs one parent for each token and at least a root, got {n} tokens and {len(self.parents)} parents"
            )
        if self.parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(self.parents[1:], 1)):
            raise ValueError(f"parents[0] must be -1 and 0 <= parents[i] < i for the rest, got {self.parents}")
        if self.draw is Draw.CERTAIN:
            if self.draft_probs is not None or self.sources:
                raise ValueError("a tree picked with certainty carries no draft_probs; name its draw or leave them out")
        elif n > 1:
            self._check_sources(n)
        if self.draw is not Draw.INDEPENDENT and len(set(zip(self.parents, self.tokens, strict=True))) != n:
            raise ValueError(
                f"siblings must hold different tokens unless drawn with replacement, got tokens {self.tokens} under parents {self.parents}"
            )

    def _check_sources(self, n: int) -> None:
        if self.draft_probs is None or self.draft_probs.dim() != 2:
            raise ValueError(f"a tree drawn {self.draw.value} needs draft_probs of shape (m, V)")
        rows = self.draft_probs.shape[0]
        if len(self.sources) != n or any(not 0 <= s < rows for s in self.sources[1:]):
            raise ValueError(
                f"sources must name one of the {rows} rows of draft_probs for each node but the root, got {self.sources}"
            )

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
        return cls(nodes, parents, Draw.INDEPENDENT, draft_probs, parents)

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

    def ancestors(self) -> NDArray[np.bool_]:
        """(n, n) matrix: entry [i, j] says whether j is i or one of its ancestors."""
        return ancestor_matrix(self.parents)

    def is_path(self, nodes: Sequence[int]) -> bool:
        """Whether ``nodes`` starts at the root and each next node is a child of the one before."""
        return bool(nodes) and nodes[0] == 0 and all(self.parents[b] == a for a, b in pairwise(nodes))


def ancestor_matrix(parents: Sequence[int]) -> NDArray[np.bool_]:
    """(n, n) matrix of ``parents`` (n,): entry [i, j] says whether j is i or one of its ancestors."""
    seen = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen
