"""Rejection sampling along the tree: rules 2 to 5 of docs/verification.md, chosen by the tree's own draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.interfaces import TargetProbs, Verdict
from specdec.noise import RowNoise, Stream
from specdec.tree import Draw, TokenTree
from specdec.verifiers.walk import check_draw, follow


@dataclass(frozen=True, slots=True)
class RejectionVerifier:
    """Accept a child x with probability min(1, p(x) / q(x)); after a rejection go on with norm((p - q)+).

    p is the target's distribution, q the one x was drawn from. On a chain this is speculative sampling (Leviathan et
    al., 2023; Chen et al., 2023). Siblings drawn independently keep q (SpecInfer's multi-step sampling, Miao et al.,
    2024); siblings drawn without replacement are tried in draw order and take each rejected token out of q (recursive
    rejection sampling: Jeon et al., 2024; Sequoia, Chen et al., 2024). A child picked with certainty is a draw from
    the distribution with all mass on it: accepted with p(x), else x leaves p.
    """

    name: str = "rejection"
    lossless: bool = True
    draws: frozenset[Draw] = frozenset({Draw.CERTAIN, Draw.INDEPENDENT, Draw.WITHOUT_REPLACEMENT})

    def verify(self, tree: TokenTree, target: TargetProbs, noise: RowNoise) -> Verdict:
        check_draw(self, tree)
        if target.is_greedy:
            # p has all its mass on one token: that child is accepted for certain and no other ever is.
            return follow(tree, lambda node, _: target.best(node))
        children = tree.children()
        nodes, tokens = [0], list[int]()
        while True:
            residual = target.probs(nodes[-1])
            accepted, residual = _try_children(tree, children[nodes[-1]], residual, noise, len(tokens))
            if accepted is None:
                stream = Stream.RESIDUAL if children[nodes[-1]] else Stream.TARGET
                tokens.append(noise.draw(residual, len(tokens), stream))
                return Verdict(tuple(nodes), tuple(tokens))
            nodes.append(accepted)
            tokens.append(tree.tokens[accepted])


def _try_children(
    tree: TokenTree, children: list[int], residual: Tensor, noise: RowNoise, depth: int
) -> tuple[int | None, Tensor]:
    """The first accepted child, or None and the distribution (V,) that is left after all rejections."""
    draft_probs: Tensor | None = None
    for order, child in enumerate(children):
        token = tree.tokens[child]
        mass = float(residual[token])
        if tree.draw is Draw.CERTAIN:
            if noise.coin(mass, depth, order):
                return child, residual
            residual = _without(residual, token)
            continue
        assert tree.draft_probs is not None
        if draft_probs is None or tree.draw is Draw.INDEPENDENT:
            draft_probs = tree.draft_probs[tree.sources[child]].to(residual)
        # The coin is compared with <, so that a token of probability 0 is never accepted.
        if noise.coin(mass / float(draft_probs[token]), depth, order):
            return child, residual
        residual = _normalised((residual - draft_probs).clamp(min=0), residual)
        if tree.draw is Draw.WITHOUT_REPLACEMENT:
            draft_probs = _without(draft_probs, token)
    return None, residual


def _without(probs: Tensor, token: int) -> Tensor:
    """``probs`` (V,) given that the outcome is not ``token``."""
    left = probs.clone()
    left[token] = 0
    return _normalised(left, probs)


def _normalised(mass: Tensor, before: Tensor) -> Tensor:
    """``mass`` (V,) scaled to sum to one.

    If nothing is left the rejection that led here had probability zero and happened by rounding: p and q agree to the
    last bit, and the distribution before it is as right.
    """
    total = mass.sum()
    return mass / total if bool(total > 0) else torch.clone(before)
