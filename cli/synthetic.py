"""The what-if of a bench: a drafter that is accepted as often as asked. Its time is real, its text means nothing.

Drafter and verifier belong together and to the bench alone. The target verifies a chain of arbitrary tokens as it
would any other; how many are kept is decided by noise and the given rates, not by the target.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from specdec.interfaces import BatchRule, Drafter, Limit, Row, Scores, TargetDistributions, Verdict
from specdec.rng import Rng, RowRng
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree

SYNTHETIC = "synthetic"
_MEAN_LENGTH = 8  # tokens drafted where only a mean is given

Rates = tuple[float, ...]


def parse_acceptance(text: str) -> Rates:
    """Rates by depth, each given that the one before was accepted: "0.8,0.6", or "mean=2.5" tokens a step.

    Raises:
        ValueError: another form, rates outside [0, 1], or a mean that no such draft has.
    """
    name, equals, value = text.partition("=")
    try:
        numbers = tuple(float(part) for part in (value if equals else text).split(","))
    except ValueError:
        numbers = ()
    if equals and name == "mean" and len(numbers) == 1 and 1 <= numbers[0] <= 1 + _MEAN_LENGTH:
        return (_rate_of(numbers[0]),) * _MEAN_LENGTH
    if not equals and numbers and all(0 <= rate <= 1 for rate in numbers):
        return numbers
    raise ValueError(
        "synthetic acceptance is written as rates such as 0.8,0.6,0.5 (each from 0 to 1), or as mean=2.5 (from 1 to "
        f"{1 + _MEAN_LENGTH} tokens a step); got {text!r}"
    )


def _rate_of(tokens: float) -> float:
    """The one rate with which a draft of the usual length brings ``tokens`` a step, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(middle**depth for depth in range(_MEAN_LENGTH + 1)) < tokens:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, slots=True)
class SyntheticDrafter(Drafter):
    """Proposes a chain as long as there are rates."""

    rates: Rates
    token: int  # any that ends no text
    name: str = SYNTHETIC

    def begin(self, rows: Sequence[Row]) -> None: ...

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        lengths = [max(0, min(len(self.rates), limit.depth, limit.nodes)) for limit in limits]
        return [
            TokenTree.chain(row.tokens[-1], (self.token,) * length) for row, length in zip(rows, lengths, strict=True)
        ]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None: ...

    def end(self, rows: Sequence[Row]) -> None: ...


@dataclass(frozen=True, slots=True)
class SyntheticVerifier:
    """Accepts by the rates; asks the target for each token that a real one would ask for, so that time is real."""

    rates: Rates
    token: int
    name: str = SYNTHETIC
    lossless: bool = False
    shares_target_noise: bool = False
    looks_ahead: bool = False
    chain_only: bool = False
    draws: frozenset[Draw] = frozenset(Draw)

    def batch_rule(self, params: SamplingParams) -> BatchRule | None:
        return None

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        accepted = 0
        self._ask(target, 0)
        while accepted < min(len(tree) - 1, len(self.rates)) and rng.bernoulli(self.rates[accepted], accepted):
            accepted += 1
            self._ask(target, accepted)
        return Verdict(tuple(range(accepted + 1)), (*tree.tokens[1 : accepted + 1], self.token))

    def _ask(self, target: TargetDistributions, node: int) -> None:
        if target.is_greedy:
            target.best(node)
        else:
            target.probs(node)


def synthetic_pair(text: str, eos_ids: Collection[int]) -> tuple[SyntheticDrafter, SyntheticVerifier]:
    """Drafter and verifier for ``text`` (see parse_acceptance); no text of theirs ends before its time."""
    rates, token = parse_acceptance(text), next(i for i in range(len(eos_ids) + 1) if i not in eos_ids)
    return SyntheticDrafter(rates, token), SyntheticVerifier(rates, token)
