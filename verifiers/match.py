"""Sample-and-match: rule 1 of docs/verification.md, exact for any tree."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.interfaces import BatchRule, TargetDistributions, Verdict
from specdec.rng import RowRng
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree
from specdec.verifiers.common.walk import follow


@dataclass(frozen=True, slots=True)
class MatchVerifier:
    """At each node draw the target's token; where a child holds it move there, else emit it and stop.

    The noise of each draw is tied to the token's position, so the output is token-identical to plain decoding with
    the same seed, whatever the drafter, the tree or the batch (up to rounding inside the model). For trees picked
    with certainty no exact rule accepts more. The tree may depend on the same noise: a drafter that proposes
    argmax(log q + noise) is matched more often (drafter-invariant coupling; Daliri, Musco and Suresh, 2025).
    """

    name: str = "match"
    lossless: bool = True
    chain_only: bool = False
    shares_target_noise: bool = True
    looks_ahead: bool = False
    draws: frozenset[Draw] = frozenset(Draw)

    def batch_rule(self, params: SamplingParams) -> BatchRule:
        return BatchRule.FOLLOW

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        if target.is_greedy:
            return follow(tree, lambda node, _: target.best(node))
        return follow(tree, lambda node, depth: rng.draw(target.probs(node), depth))


build = MatchVerifier  # what the name of this file stands for
