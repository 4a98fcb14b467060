"""How large a step's trees may be: a fixed size, or what the machine and the drafts make worthwhile right now.

The adaptive budget learns two things as it goes: what a pass of n columns costs (wall seconds, by number of rows), and
how often a node with a given estimate is accepted. Each step then takes the tree size that yields the most tokens a
second, down to no draft at all. It decides by timing, so 16-bit runs may differ in near ties from run to run; what is
emitted stays exact, because only nodes picked with certainty are ever left out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from specdec.interfaces import Limit, Row, Verdict
from specdec.tree import TokenTree, best_part

_NUM_BUCKETS = 16
_BUCKETS_PER_HALVING = 2


class Budget(Protocol):
    """Decides on sizes before and after drafting, and sees what came of it."""

    def limits(self, rows: Sequence[Row], chain_only: bool) -> list[Limit]:
        """How much to draft for each row."""

    def cut(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[TokenTree]:
        """The part of each tree that is verified."""

    def learn(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        verdicts: Sequence[Verdict],
        draft_s: float,
        score_s: float,
    ) -> None:
        """What a step cost in wall seconds, and what was accepted."""


@dataclass(frozen=True, slots=True)
class FixedBudget:
    """Always up to ``max_nodes`` nodes below the root."""

    max_nodes: int

    def limits(self, rows: Sequence[Row], chain_only: bool) -> list[Limit]:
        return [Limit(row.num_left - 1, self.max_nodes, chain_only) for row in rows]

    def cut(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[TokenTree]:
        return list(trees)

    def learn(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        verdicts: Sequence[Verdict],
        draft_s: float,
        score_s: float,
    ) -> None: ...


@dataclass(slots=True)
class PassCosts:
    """Seconds of a pass by (rows, columns): medians of recent ones, interpolated between the sizes seen.

    Args:
        slope: what one more column costs, as a share of a one-column pass, where nothing larger was seen.
    """

    slope: float = 0.03
    _recent: dict[int, dict[int, deque[float]]] = field(default_factory=dict)

    def add(self, num_rows: int, num_columns: int, seconds: float) -> None:
        sizes = self._recent.setdefault(num_rows, {})
        sizes.setdefault(num_columns, deque(maxlen=9)).append(seconds)

    def knows(self, num_rows: int, num_columns: int) -> bool:
        return num_columns in self._recent.get(num_rows, {})

    def curve(self, num_rows: int, max_columns: int) -> list[float]:
        """Seconds for 1 to ``max_columns`` columns."""
        known = sorted((n, median(times)) for n, times in self._nearest(num_rows).items())
        if not known:
            return [1.0 + self.slope * n for n in range(max_columns)]
        return [self._at(known, n) for n in range(1, max_columns + 1)]

    def _nearest(self, num_rows: int) -> dict[int, deque[float]]:
        if not self._recent:
            return {}
        return self._recent[min(self._recent, key=lambda rows: abs(rows - num_rows))]

    def _at(self, known: list[tuple[int, float]], columns: int) -> float:
        below = [pair for pair in known if pair[0] <= columns]
        above = [pair for pair in known if pair[0] > columns]
        if below and above:
            (n0, t0), (n1, t1) = below[-1], above[0]
            return t0 + (t1 - t0) * (columns - n0) / (n1 - n0)
        n, seconds = below[-1] if below else above[0]
        return seconds * (1 + self.slope * (columns - n)) if below else seconds / (1 + self.slope * (n - columns))


@dataclass(slots=True)
class Calibration:
    """What share of nodes with a given estimate was accepted: drafters guess, this counts."""

    hits: list[float] = field(default_factory=lambda: [6.0 * _middle(b) for b in range(_NUM_BUCKETS)])
    trials: list[float] = field(default_factory=lambda: [6.0] * _NUM_BUCKETS)

    def value(self, estimate: float) -> float:
        bucket = _bucket(estimate)
        return self.hits[bucket] / self.trials[bucket]

    def learn(self, estimate: float, is_accepted: bool) -> None:
        bucket = _bucket(estimate)
        self.hits[bucket] += is_accepted
        self.trials[bucket] += 1
        if self.trials[bucket] > 400:  # what is long past counts less
            self.hits[bucket] /= 2
            self.trials[bucket] /= 2


def _bucket(estimate: float) -> int:
    return min(_NUM_BUCKETS - 1, int(-math.log2(max(estimate, 1e-6)) * _BUCKETS_PER_HALVING))


def _middle(bucket: int) -> float:
    return float(2.0 ** (-(bucket + 0.5) / _BUCKETS_PER_HALVING))


@dataclass(slots=True)
class AdaptiveBudget:
    """The size that yields most tokens a second by what was learned; no draft where that is less than plain decoding.

    Trees with estimates and without drawn nodes are cut after drafting. Drafting itself is switched off while it does
    not pay, and tried again after a pause that doubles each time it fails.

    Args:
        max_nodes: the largest tree, in nodes below the root.
        costs: what passes cost; shared between budgets of the same target and machine.
        margin: a draft must promise this much more than plain decoding.
    """

    max_nodes: int
    costs: PassCosts = field(default_factory=PassCosts)
    calibration: Calibration = field(default_factory=Calibration)
    margin: float = 1.02
    _gain: float = 1.0  # tokens a second against plain decoding, running mean
    _pause: int = 0  # steps that drafting still rests
    _next_pause: int = 4
    _num_steps: int = 0

    def limits(self, rows: Sequence[Row], chain_only: bool) -> list[Limit]:
        rests = self._pause > 0 or self._needs_baseline(len(rows))
        return [Limit(0 if rests else row.num_left - 1, self.max_nodes, chain_only) for row in rows]

    def _needs_baseline(self, num_rows: int) -> bool:
        """A plain pass must have been seen before anything can be compared with it; the first holds the prompt."""
        return self._num_steps > 0 and not self.costs.knows(num_rows, 1)

    def cut(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[TokenTree]:
        if any(len(tree) > 1 and (not tree.is_certain or not tree.estimates) for tree in trees):
            return list(trees)
        values = [self._values(tree) for tree in trees]
        most = max(len(tree) for tree in trees)
        curve = self.costs.curve(len(trees), most)
        ranked = [sorted(each[1:], reverse=True) for each in values]
        tokens, best_size, best_rate = float(len(trees)), 0, len(trees) / curve[0] * self.margin
        for size in range(1, most):
            tokens += sum(each[size - 1] for each in ranked if len(each) >= size)
            if tokens / curve[size] > best_rate:
                best_size, best_rate = size, tokens / curve[size]
        return [best_part(tree, each, best_size) for tree, each in zip(trees, values, strict=True)]

    def _values(self, tree: TokenTree) -> list[float]:
        values = [1.0]
        for node in range(1, len(tree)):
            values.append(min(values[tree.parents[node]], self.calibration.value(tree.estimates[node])))
        return values

    def learn(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        verdicts: Sequence[Verdict],
        draft_s: float,
        score_s: float,
    ) -> None:
        self._num_steps += 1
        if all(row.num_steps > 1 for row in rows):  # a row's first pass holds its prompt
            self.costs.add(len(rows), max(len(tree) for tree in trees), score_s)
        for tree, verdict in zip(trees, verdicts, strict=True):
            if tree.estimates:
                accepted = set(verdict.nodes)
                for node in range(1, len(tree)):
                    self.calibration.learn(tree.estimates[node], node in accepted)
        if self._pause > 0:
            self._pause -= 1
            return
        self._judge(trees, verdicts, draft_s, score_s)

    def _judge(self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], draft_s: float, score_s: float) -> None:
        """Whether drafting as such pays: what it brought against its own time and that of the larger pass."""
        num_rows = len(trees)
        if not self.costs.knows(num_rows, 1):
            return
        plain = self.costs.curve(num_rows, 1)[0]
        tokens = sum(len(verdict.tokens) for verdict in verdicts) / num_rows
        self._gain += 0.1 * (tokens * plain / (draft_s + score_s) - self._gain)
        if self._gain < 1.0 / self.margin:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, 64)
            self._gain = 1.0
        elif self._gain > self.margin:
            self._next_pause = 4


def make_budget(max_nodes: int, adaptive: bool, costs: PassCosts | None = None) -> Budget:
    """An AdaptiveBudget that starts from ``costs``, or a FixedBudget.

    Raises:
        ValueError: ``max_nodes`` is negative.
    """
    if max_nodes < 0:
        raise ValueError(f"max_nodes must be 0 or more, got {max_nodes}")
    return AdaptiveBudget(max_nodes, costs or PassCosts()) if adaptive else FixedBudget(max_nodes)
