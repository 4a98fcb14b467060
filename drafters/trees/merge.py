"""Several trees of one row merged into one, so that every rule that was exact for the parts is exact for the whole.

SpecInfer's merge-based speculation (Miao et al., 2024). Paths that agree share their nodes. A drawn node that repeats
a sibling stays as an attempt of its own, because its rejection changes what later siblings are compared with; a
certain node that repeats one adds nothing and is united with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.tree import Draw, TokenTree


def merge(trees: Sequence[TokenTree]) -> TokenTree:
    """One tree that holds the nodes of all ``trees`` (of the same root), siblings in the order of ``trees``.

    A node's estimate is the highest that any tree gave it.

    Raises:
        ValueError: no trees, or trees of different roots.
    """
    if not trees or len({tree.tokens[0] for tree in trees}) != 1:
        raise ValueError(f"trees to merge must have one common root, got roots {[tree.tokens[0] for tree in trees]}")
    if len(trees) == 1:
        return trees[0]
    merged = _Merged(trees[0].tokens[0])
    for tree in trees:
        merged.add(tree)
    return merged.tree()


class _Merged:
    """The tree in the making."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.sources, self.estimates = [root], [-1], [-1], [1.0]
        self.draft_probs: list[Tensor] = []
        self.draws: list[Draw] = []
        self.places: dict[tuple[int, int], int] = {}  # (parent, token) -> the first node that holds it

    def add(self, tree: TokenTree) -> None:
        first_row = len(self.draws)
        self.draws += tree.draws
        if tree.draft_probs is not None:
            self.draft_probs.append(tree.draft_probs)
        where = [0]
        for node in range(1, len(tree)):
            parent, token, source = where[tree.parents[node]], tree.tokens[node], tree.source(node)
            estimate = tree.estimates[node] if tree.estimates else 0.0
            place = self.places.get((parent, token))
            if place is None or source >= 0:
                self._append(parent, token, -1 if source < 0 else first_row + source, estimate)
            if place is None:
                place = self.places[(parent, token)] = len(self.tokens) - 1
            self.estimates[place] = max(self.estimates[place], estimate)
            where.append(place)

    def _append(self, parent: int, token: int, source: int, estimate: float) -> None:
        self.tokens.append(token)
        self.parents.append(parent)
        self.sources.append(source)
        self.estimates.append(estimate)

    def tree(self) -> TokenTree:
        tokens, parents, estimates = tuple(self.tokens), tuple(self.parents), tuple(self.estimates)
        if not self.draws:
            return TokenTree(tokens, parents, estimates=estimates)
        probs = torch.cat(self.draft_probs)
        return TokenTree(tokens, parents, tuple(self.sources), probs, tuple(self.draws), estimates)
