"""Typical acceptance: rule 9 of docs/verification.md (Medusa; Cai et al., 2024). Lossy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from specdec.interfaces import BatchRule, TargetDistributions, Verdict
from specdec.rng import RowRng
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree


@dataclass(frozen=True, slots=True)
class TypicalVerifier:
    """Accept what the target finds typical enough: p(x) > min(epsilon, delta exp(-entropy of p)).

    The longest accepted path counts, the first in draw order among equals; one token of the target's follows. The
    output does NOT follow the target's distribution above temperature 0, and every report that used it says so.

    Args:
        epsilon: threshold where the target is sure.
        delta: scale of the threshold where it is not.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    name: str = "typical"
    lossless: bool = False
    chain_only: bool = False
    shares_target_noise: bool = True  # it asks for no draft distributions: drafters may pick as they like
    looks_ahead: bool = True
    draws: frozenset[Draw] = frozenset(Draw)

    def batch_rule(self, params: SamplingParams) -> BatchRule | None:
        return None

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        children = tree.children()
        depths = tree.depths()
        accepted, frontier = [0], [0]
        while frontier:
            node = frontier.pop(0)
            if not children[node]:
                continue
            probs = target.probs(node)
            entropy = -float(probs.xlogy(probs).sum())
            threshold = min(self.epsilon, self.delta * math.exp(-entropy))
            typical = [child for child in children[node] if float(probs[tree.tokens[child]]) > threshold]
            accepted += typical
            frontier += typical
        best = max(accepted, key=lambda node: (depths[node], -node))
        nodes = tree.path(best)
        last = rng.draw(target.probs(best), len(nodes) - 1)
        return Verdict(tuple(nodes), (*(tree.tokens[n] for n in nodes[1:]), last))


build = TypicalVerifier  # what the name of this file stands for
