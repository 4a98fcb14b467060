"""How often drafts come true: by what the drafter says of a node, and by depth where it says nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from specdec.budget.hit_counts import count_trial
from specdec.tree import TokenTree

_NUM_BUCKETS = 16
_BUCKETS_PER_HALVING = 2
_LAST = _NUM_BUCKETS - 1
_LOG_GUESSES = [-(bucket + 0.5) / _BUCKETS_PER_HALVING * math.log(2) for bucket in range(_NUM_BUCKETS)]
_FIRST_RATE = 0.7  # of tokens of a drafter that was never tried
_PRIOR = 2.0  # it counts as so many trials


@dataclass(slots=True)
class _Shares:
    """What share of trials was a hit, by classes of guesses.

    Where little was counted, guesses are taken to be off by the same power as elsewhere.
    """

    hits: list[float] = field(default_factory=lambda: [0.0] * _NUM_BUCKETS)
    trials: list[float] = field(default_factory=lambda: [0.0] * _NUM_BUCKETS)
    _values: list[float] = field(default_factory=list)  # by bucket; empty: to be computed

    def value(self, guess: float) -> float:
        if not self._values:
            self._values = self._fitted()
        return self._values[_bucket(guess)]

    def learn(self, guess: float, is_hit: bool) -> None:
        bucket = _bucket(guess)
        count_trial(self.hits, self.trials, bucket, is_hit)
        self._values = []

    def _fitted(self) -> list[float]:
        """Counts, and six of the power law as a prior; the law itself by least squares of logarithms."""
        above, below = 40.0, 40.0
        for log_guess, hits, trials in zip(_LOG_GUESSES, self.hits, self.trials, strict=True):
            if trials:
                found = math.log((hits + 6 * math.exp(log_guess)) / (trials + 6))
                above += trials * log_guess * found
                below += trials * log_guess**2
        power = min(max(above / below, 0.25), 4.0)
        return [
            (hits + 6 * math.exp(power * log_guess)) / (trials + 6)
            for log_guess, hits, trials in zip(_LOG_GUESSES, self.hits, self.trials, strict=True)
        ]


def _bucket(guess: float) -> int:
    return min(_LAST, int(-math.log2(max(guess, 1e-6)) * _BUCKETS_PER_HALVING))


@dataclass(slots=True)
class Calibration:
    """What share of nodes with a given estimate was accepted: drafters guess, this counts.

    A drafter that says 0.6 to the nth power where 0.8 to the nth is right is believed so at sizes that were never
    tried. Estimates so low that they are all alike say nothing of the path any more: there it counts how often a node
    was accepted below an accepted parent, by the ratio of their estimates.
    """

    _paths: _Shares = field(default_factory=_Shares)
    _edges: _Shares = field(default_factory=_Shares)  # of nodes in the last class

    def value(self, estimate: float) -> float:
        return self._paths.value(estimate)

    def values(self, tree: TokenTree) -> list[float]:
        """(n,) for the estimates of ``tree``, never growing from a parent to its child."""
        values = [1.0]
        for node in range(1, len(tree)):
            parent, estimate = tree.parents[node], tree.estimates[node]
            if _bucket(estimate) == _LAST:
                values.append(values[parent] * min(1.0, self._edges.value(_ratio(estimate, tree.estimates[parent]))))
            else:
                values.append(min(values[parent], self._paths.value(estimate)))
        return values

    def learn(self, estimate: float, is_accepted: bool, parent: float | None = 1.0) -> None:
        """Count a node that was verified; ``parent`` is the estimate of its parent, None if that was rejected."""
        self._paths.learn(estimate, is_accepted)
        if parent is not None and _bucket(estimate) == _LAST:
            self._edges.learn(_ratio(estimate, parent), is_accepted)


def _ratio(estimate: float, parent: float) -> float:
    return estimate / parent if parent > 0 else 0.0


@dataclass(slots=True)
class DepthRates:
    """How often a draft that was right down to one depth was right one deeper.

    Depths with few trials are taken to be like the others, so that a short draft tells what a longer one may bring.
    """

    hits: list[float] = field(default_factory=list)
    trials: list[float] = field(default_factory=list)

    def learn(self, depth: int, num_accepted: int) -> None:
        """A tree ``depth`` levels deep had ``num_accepted`` tokens accepted."""
        while len(self.trials) < depth:
            self.hits.append(0.0)
            self.trials.append(0.0)
        for level in range(min(depth, num_accepted + 1)):
            count_trial(self.hits, self.trials, level, level < num_accepted, memory=100)

    def expected(self, depth: int | None = None) -> list[float]:
        """[d]: accepted tokens of a draft d levels deep, down to ``depth`` (default: the deepest that was tried)."""
        depth = len(self.trials) if depth is None else depth
        common = (sum(self.hits) + _PRIOR * _FIRST_RATE) / (sum(self.trials) + _PRIOR)
        reach, total = 1.0, [0.0]
        for level in range(depth):
            hits, trials = (self.hits[level], self.trials[level]) if level < len(self.trials) else (0.0, 0.0)
            reach *= (hits + _PRIOR * common) / (trials + _PRIOR)
            total.append(total[-1] + reach)
        return total


@dataclass(slots=True)
class NodeRates:
    """How often the node of each number was accepted, in trees that must be verified as they are."""

    hits: list[float] = field(default_factory=list)
    trials: list[float] = field(default_factory=list)

    def learn(self, num_nodes: int, accepted: Iterable[int]) -> None:
        """``num_nodes`` below the root were verified."""
        while len(self.trials) < num_nodes:
            self.hits.append(0.0)
            self.trials.append(0.0)
        hits = set(accepted)
        for i in range(num_nodes):
            count_trial(self.hits, self.trials, i, i + 1 in hits, memory=100)

    def expected(self, guesses: Sequence[float]) -> list[float]:
        """[n]: accepted tokens of the first n nodes; ``guesses`` (one a node) stand in for nodes that were not tried."""
        total = [0.0]
        for i, guess in enumerate(guesses):
            hits, trials = (self.hits[i], self.trials[i]) if i < len(self.trials) else (0.0, 0.0)
            total.append(total[-1] + (hits + _PRIOR * guess) / (trials + _PRIOR))
        return total
