"""How often the successors of a context come true, learned for each class and each length of context."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.budget.hit_counts import count_trial
from specdec.drafters.lookup.successors import NUM_CLASSES, TEXT_RATES, TYPICAL, Found


@dataclass(slots=True)
class ClassRates:
    """How often a successor of each class was the token that came, for each length of context."""

    hits: list[list[float]]  # (max_order + 1, classes)
    trials: list[list[float]]  # (max_order + 1, classes)

    @classmethod
    def prior(cls, max_order: int) -> ClassRates:
        """Worth ten observations: a short context says less than the text that it was seen in."""
        shares = [1 - 0.6 ** (order + 1) for order in range(max_order + 1)]
        return cls._worth(10.0, [[*(share * rate for rate in TYPICAL), *TEXT_RATES] for share in shares])

    @classmethod
    def averages(cls, max_order: int) -> ClassRates:
        """Worth thirty: probabilities that are averages over many places hold nearly as they stand."""
        return cls._worth(30.0, [[*(0.9 * rate for rate in TYPICAL), *TEXT_RATES]] * (max_order + 1))

    @classmethod
    def _worth(cls, trials: float, rates: list[list[float]]) -> ClassRates:
        return cls([[trials * rate for rate in row] for row in rates], [[trials] * NUM_CLASSES for _ in rates])

    def learn(self, successors: Found, token: int) -> None:
        """``token`` came where ``successors`` were the known successors."""
        order, tokens, classes = successors
        hits, trials = self.hits[order], self.trials[order]
        for successor, kind in zip(tokens, classes, strict=True):
            count_trial(hits, trials, kind, successor == token)

    def values(self) -> list[list[float]]:
        """(max_order + 1, classes) acceptance rates."""
        return [[h / t for h, t in zip(*rows, strict=True)] for rows in zip(self.hits, self.trials, strict=True)]
