"""Block verification of chains: rule 7 of docs/verification.md (Sun et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.errors import InexactDraftError
from specdec.interfaces import BatchRule, TargetDistributions, Verdict
from specdec.rng import RowRng, Stream
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree
from specdec.verifiers.common.residual import SiblingDraftProbs, acceptance_ratio, normalised, subtract
from specdec.verifiers.common.walk import check_draws, follow


@dataclass(frozen=True, slots=True)
class BlockVerifier:
    """Decide on a chain as a whole: never accepts fewer tokens than token-level rejection.

    With P_0 = 1 and P_i = min(1, P_(i-1) p(x_i) / q(x_i)), position i < g is kept with h_i = Z / (Z + 1 - P_i), where
    Z is the sum of (P_i p(.|x_1..i) - q(.|x_1..i))+, and h_g = P_g. The largest kept position counts; then one token
    comes from norm((P_i p - q)+), or from p behind the whole chain.
    """

    name: str = "block"
    lossless: bool = True
    chain_only: bool = True
    shares_target_noise: bool = False
    looks_ahead: bool = True
    draws: frozenset[Draw] = frozenset(Draw)

    def batch_rule(self, params: SamplingParams) -> BatchRule | None:
        return BatchRule.FOLLOW if params.is_greedy else None

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        """Raises InexactDraftError for a tree with branches too."""
        check_draws(self, tree)
        if not tree.is_chain:
            raise InexactDraftError(
                "verifier 'block' is exact for chains, got a tree with branches; use verifier 'traversal'"
            )
        if target.is_greedy:
            return follow(tree, lambda node, _: target.best(node))
        num_drafted = len(tree) - 1
        kept, keep_prob = 0, 1.0
        emitted_from = target.probs(0)
        if num_drafted:
            draft_probs = SiblingDraftProbs(tree).probs(1, emitted_from)
            emitted_from = normalised(subtract(emitted_from, draft_probs, tree.tokens[1]), emitted_from)
            here = target.probs(0)
        for i in range(1, num_drafted + 1):
            token = tree.tokens[i]
            ratio = acceptance_ratio(float(here[token]), SiblingDraftProbs(tree).probs(i, here), token)
            keep_prob = min(1.0, keep_prob * ratio)
            if keep_prob == 0.0:
                break  # nothing behind a token that the target excludes can be kept
            here = target.probs(i)
            left, held = here, keep_prob
            if i < num_drafted:
                draft_probs = SiblingDraftProbs(tree).probs(i + 1, here)
                left = subtract(keep_prob * here, draft_probs, tree.tokens[i + 1])
                mass = float(left.sum())
                held = mass / (mass + (1 - keep_prob)) if mass > 0 else 0.0
                left = normalised(left, here)
            if rng.bernoulli(held, i - 1):
                kept, emitted_from = i, left
        stream = Stream.TARGET if kept == num_drafted else Stream.RESIDUAL
        last = rng.draw(emitted_from, kept, stream)
        return Verdict(tuple(range(kept + 1)), (*tree.tokens[1 : kept + 1], last))


build = BlockVerifier  # what the name of this file stands for
