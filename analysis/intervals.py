"""95 % intervals by resampling prompts: tokens of one prompt are not independent of each other, prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % bootstrap interval; from a single prompt the interval is that point."""

    value: float
    low: float
    high: float
    num_prompts: int

    def __str__(self) -> str:
        if self.num_prompts < 2:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio_of_sums(over: NDArray[Any], under: NDArray[Any], plus: float = 0.0) -> Estimate:
    """``plus`` + sum(over) / sum(under), of one number for each prompt; NaN where nothing was counted."""
    keep = np.asarray(under) > 0
    over, under = np.asarray(over, np.float64)[keep], np.asarray(under, np.float64)[keep]
    if not len(under):
        return Estimate(np.nan, np.nan, np.nan, 0)
    picks = np.random.default_rng(0).integers(len(under), size=(NUM_RESAMPLES, len(under)))
    low, high = np.percentile(over[picks].sum(1) / under[picks].sum(1), [2.5, 97.5])
    return Estimate(plus + float(over.sum() / under.sum()), plus + float(low), plus + float(high), len(under))


def geometric_mean(ratios: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """The weighted geometric mean of ``ratios``, one for each prompt or group of prompts; as in docs/bench.md."""
    if not len(ratios):
        return Estimate(np.nan, np.nan, np.nan, 0)
    logs = np.log(np.asarray(ratios, np.float64))
    weight = np.ones(len(logs)) if weights is None else np.asarray(weights, np.float64)
    picks = np.random.default_rng(0).integers(len(logs), size=(NUM_RESAMPLES, len(logs)))
    means = (logs * weight)[picks].sum(1) / weight[picks].sum(1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return Estimate(float(np.exp((logs * weight).sum() / weight.sum())), float(low), float(high), len(logs))
