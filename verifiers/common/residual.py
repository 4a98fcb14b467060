"""Distributions after a rejection: small vector algebra that the rejection rules share. V is the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.tree import Draw, TokenTree


def without(probs: Tensor, token: int) -> Tensor:
    """``probs`` (V,) given that the outcome is not ``token``."""
    left = probs.clone()
    left[token] = 0
    return normalised(left, probs)


def normalised(mass: Tensor, before: Tensor) -> Tensor:
    """``mass`` (V,) scaled to sum to one.

    If nothing is left, the rejection that led here had probability zero and happened by rounding: target and draft
    agree to the last bit, and the distribution ``before`` it is as right.
    """
    total = mass.sum()
    return mass / total if bool(total > 0) else torch.clone(before)


@dataclass(slots=True)
class SiblingDraftProbs:
    """What the siblings of one parent are drawn from, as elder ones are rejected.

    A row of ``draft_probs`` stays as it is for independent draws and loses each rejected token where siblings were
    drawn without replacement.
    """

    tree: TokenTree
    _left: dict[int, Tensor] = field(default_factory=dict)

    def probs(self, child: int, like: Tensor) -> Tensor | None:
        """The distribution (V,) that ``child`` was drawn from given its elder siblings; None if it was certain."""
        source = self.tree.source(child)
        if source < 0:
            return None
        assert self.tree.draft_probs is not None
        if source not in self._left:
            self._left[source] = self.tree.draft_probs[source].to(like)
        return self._left[source]

    def reject(self, child: int) -> None:
        """``child`` was rejected: its younger siblings of the same draw are something else."""
        source = self.tree.source(child)
        if source >= 0 and self.tree.draws[source] is Draw.WITHOUT_REPLACEMENT:
            self._left[source] = without(self._left[source], self.tree.tokens[child])


def acceptance_ratio(target_mass: float, draft_probs: Tensor | None, token: int) -> float:
    """p(x) / q(x), not yet cut at one; a certain child has q(x) = 1."""
    return target_mass if draft_probs is None else target_mass / float(draft_probs[token])


def subtract(scaled: Tensor, draft_probs: Tensor | None, token: int) -> Tensor:
    """(scaled - q)+ (V,); a certain child has q with all mass on ``token``."""
    if draft_probs is not None:
        return (scaled - draft_probs).clamp(min=0)
    left = scaled.clone()
    left[token] = 0
    return left
