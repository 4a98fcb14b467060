"""Rejection sampling along the tree: rules 2 to 6 of docs/verification.md, composed from the draws of each child."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.interfaces import BatchRule, TargetDistributions, Verdict
from specdec.rng import RowRng, Stream
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree
from specdec.verifiers.common.residual import SiblingDraftProbs, acceptance_ratio, normalised, subtract
from specdec.verifiers.common.walk import check_draws, follow


@dataclass(frozen=True, slots=True)
class RejectionVerifier:
    """Accept a child x with probability min(1, p(x) / q(x)); after a rejection go on with norm((p - q)+).

    p is the target's distribution, q the one x was drawn from; siblings are tried in their order. On a chain this is
    speculative sampling (Leviathan et al., 2023; Chen et al., 2023). Siblings drawn independently keep q (SpecInfer's
    multi-step sampling, Miao et al., 2024); siblings drawn without replacement take each rejected token out of q
    (recursive rejection sampling: Jeon et al., 2024; Sequoia, Chen et al., 2024). A child picked with certainty is a
    draw from the distribution with all mass on it: accepted with p(x), else x leaves p. Each step is exact for the
    residual that the one before left, so siblings of different origin mix freely; one drawn sibling followed by the
    certain top k - 1 that it was drawn without is greedy multi-draft sampling (Hu et al., 2025).
    """

    name: str = "rejection"
    lossless: bool = True
    chain_only: bool = False
    shares_target_noise: bool = False
    looks_ahead: bool = False
    draws: frozenset[Draw] = frozenset(Draw)

    def batch_rule(self, params: SamplingParams) -> BatchRule:
        return BatchRule.FOLLOW if params.is_greedy else BatchRule.REJECT

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        check_draws(self, tree)
        if target.is_greedy:
            # p has all its mass on one token: that child is accepted for certain and no other ever is.
            return follow(tree, lambda node, _: target.best(node))
        children = tree.children()
        nodes, tokens = [0], list[int]()
        while True:
            below = children[nodes[-1]]
            accepted, residual = _try_children(tree, below, target.probs(nodes[-1]), rng, len(tokens))
            if accepted is None:
                # Without children the token is the target's own pick; after rejections it needs noise of its own.
                tokens.append(rng.draw(residual, len(tokens), Stream.RESIDUAL if below else Stream.TARGET))
                return Verdict(tuple(nodes), tuple(tokens))
            nodes.append(accepted)
            tokens.append(tree.tokens[accepted])


def _try_children(
    tree: TokenTree, children: list[int], residual: Tensor, rng: RowRng, depth: int
) -> tuple[int | None, Tensor]:
    """The first accepted child, or None and the distribution (V,) that is left after all rejections."""
    draft = SiblingDraftProbs(tree)
    for order, child in enumerate(children):
        token = tree.tokens[child]
        draft_probs = draft.probs(child, residual)
        # The coin is compared with <, so that a token of probability 0 is never accepted.
        if rng.bernoulli(acceptance_ratio(float(residual[token]), draft_probs, token), depth, order):
            return child, residual
        residual = normalised(subtract(residual, draft_probs, token), residual)
        draft.reject(child)
    return None, residual


build = RejectionVerifier  # what the name of this file stands for
