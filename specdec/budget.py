"""How large a step's trees may be: a fixed size, or what the machine and the drafts make worthwhile right now.

The adaptive budget learns two things as it goes: what a pass of n columns costs (wall seconds, by number of rows), and
how often a node with a given estimate is accepted. Each step then takes the tree size that yields the most tokens a
second, down to no draft at all. It decides by timing, so 16-bit runs may differ in near ties from run to run; what is
emitted stays exact, because only nodes picked with certainty are ever left out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from specdec.hit_counts import count_trial
from specdec.interfaces import Limit, Row, Verdict
from specdec.tree import TokenTree, best_part

_NUM_BUCKETS = 16
_BUCKETS_PER_HALVING = 2
_LOG_GUESSES = [-(bucket + 0.5) / _BUCKETS_PER_HALVING * math.log(2) for bucket in range(_NUM_BUCKETS)]
_NUM_RECENT = 15
_SEED_WEIGHT = 3  # a measured curve counts as so many passes of each size
_FIRST_DEPTH = 4
_MAX_CREDIT = 6.0  # so that what was gained long ago does not pay for much


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


@dataclass(slots=True)
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
    """Seconds of a pass by (rows, columns): medians of recent ones, never falling with size, interpolated between.

    Threads that run one model share its costs: one may add a size while another one looks.

    Args:
        slope: what one more column costs, as a share of a one-column pass, where nothing larger was seen.
    """

    slope: float = 0.03
    _recent: dict[int, dict[int, deque[float]]] = field(default_factory=dict)
    _known: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # of those rows since the last addition

    @classmethod
    def seeded(cls, curves: Mapping[int, Mapping[int, float]]) -> PassCosts:
        """Costs measured earlier, number of rows -> columns -> seconds; what is seen from now on replaces them."""
        costs = cls()
        for num_rows, curve in curves.items():
            for num_columns, seconds in curve.items():
                for _ in range(_SEED_WEIGHT):
                    costs.add(num_rows, num_columns, seconds)
        return costs

    def add(self, num_rows: int, num_columns: int, seconds: float) -> None:
        sizes = self._recent.setdefault(num_rows, {})
        sizes.setdefault(num_columns, deque(maxlen=_NUM_RECENT)).append(seconds)
        self._known.pop(num_rows, None)

    def count(self, num_rows: int, num_columns: int) -> int:
        """How many recent passes of this size are known."""
        return len(self._recent.get(num_rows, {}).get(num_columns, ()))

    def knows(self, num_rows: int, num_columns: int) -> bool:
        return self.count(num_rows, num_columns) > 0

    def curve(self, num_rows: int, max_columns: int) -> list[float]:
        """Seconds for 1 to ``max_columns`` columns."""
        if not self._recent:
            return [1.0 + self.slope * n for n in range(max_columns)]
        nearest = min(tuple(self._recent), key=lambda rows: abs(rows - num_rows))
        known = self._known.get(nearest)
        if known is None:
            sizes = sorted(self._recent[nearest].items())
            known = self._known[nearest] = _rising([(n, median(times), len(times)) for n, times in sizes if times])
        return [self._at(known, n) for n in range(1, max_columns + 1)]

    def _at(self, known: list[tuple[int, float]], columns: int) -> float:
        place = bisect_right(known, columns, key=lambda pair: pair[0])
        if place == 0:
            n, seconds = known[0]
            return seconds / (1 + self.slope * (n - columns))
        n0, t0 = known[place - 1]
        if place == len(known):
            return t0 * (1 + self.slope * (columns - n0))
        n1, t1 = known[place]
        return t0 + (t1 - t0) * (columns - n0) / (n1 - n0)


def _rising(points: Sequence[tuple[int, float, int]]) -> list[tuple[int, float]]:
    """(size, seconds, weight) with seconds averaged where they fall with size: one lucky time must not decide."""
    pools: list[tuple[float, int, list[int]]] = []  # mean seconds, weight, sizes
    for size, seconds, weight in points:
        sizes = [size]
        while pools and pools[-1][0] > seconds:
            mean, other, before = pools.pop()
            seconds = (mean * other + seconds * weight) / (other + weight)
            weight += other
            sizes = before + sizes
        pools.append((seconds, weight, sizes))
    return [(size, seconds) for seconds, _, sizes in pools for size in sizes]


@dataclass(slots=True)
class Calibration:
    """What share of nodes with a given estimate was accepted: drafters guess, this counts.

    Where little was counted, estimates are taken to be off by the same power as elsewhere: a drafter that says 0.6 to
    the nth power where 0.8 to the nth is right is believed so at sizes that were never tried.
    """

    hits: list[float] = field(default_factory=lambda: [0.0] * _NUM_BUCKETS)
    trials: list[float] = field(default_factory=lambda: [0.0] * _NUM_BUCKETS)
    _values: list[float] = field(default_factory=list)  # by bucket; empty: to be computed

    def value(self, estimate: float) -> float:
        if not self._values:
            self._values = self._fitted()
        return self._values[_bucket(estimate)]

    def values(self, tree: TokenTree) -> list[float]:
        """(n,) for the estimates of ``tree``, never growing from a parent to its child."""
        values = [1.0]
        for node in range(1, len(tree)):
            values.append(min(values[tree.parents[node]], self.value(tree.estimates[node])))
        return values

    def learn(self, estimate: float, is_accepted: bool) -> None:
        bucket = _bucket(estimate)
        count_trial(self.hits, self.trials, bucket, is_accepted)
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


def _bucket(estimate: float) -> int:
    return min(_NUM_BUCKETS - 1, int(-math.log2(max(estimate, 1e-6)) * _BUCKETS_PER_HALVING))


@dataclass(slots=True)
class DepthRates:
    """How often a draft that was right down to one depth was right one deeper."""

    hits: list[float] = field(default_factory=list)
    trials: list[float] = field(default_factory=list)

    def learn(self, depth: int, num_accepted: int) -> None:
        """A tree ``depth`` levels deep had ``num_accepted`` tokens accepted."""
        while len(self.trials) < depth:
            self.hits.append(1.4)
            self.trials.append(2.0)
        for level in range(min(depth, num_accepted + 1)):
            count_trial(self.hits, self.trials, level, level < num_accepted, memory=100)

    def expected(self) -> list[float]:
        """[d]: accepted tokens of a draft d levels deep."""
        reach, total = 1.0, [0.0]
        for hits, trials in zip(self.hits, self.trials, strict=True):
            reach *= hits / trials
            total.append(total[-1] + reach)
        return total


@dataclass(slots=True)
class AdaptiveBudget:
    """The size that yields most tokens a second by what was learned; no draft where that is less than plain decoding.

    Trees with estimates and without drawn nodes are cut after drafting. Before it, the number of levels is limited
    where these cost time, and drafting is switched off by an account, in passes of plain decoding: every draft books what it
    gained or lost, every step adds ``overhead``, and drafting waits while the account is empty. So a run is never
    slower than plain decoding by more than ``overhead``, the ``credit`` to begin with, and one draft; a draft that
    loses little is tried often, a costly one rarely, and one that pays keeps itself going.

    Args:
        max_nodes: the largest tree, in nodes below the root.
        costs: what passes cost; shared between budgets of the same target and machine.
        margin: a larger tree must promise this much more than plain decoding.
        overhead: the share of plain decoding's time that may go into drafts that turn out useless.
        credit: what the account holds, in passes.
    """

    max_nodes: int
    costs: PassCosts = field(default_factory=PassCosts)
    calibration: Calibration = field(default_factory=Calibration)
    margin: float = 1.02
    overhead: float = 0.015
    credit: float = 1.5
    _draft_costs: PassCosts = field(default_factory=lambda: PassCosts(slope=0.0))  # by depth + 1
    _depths: DepthRates = field(default_factory=DepthRates)
    _nodes_per_level: float = 1.0
    _unbooked_s: float = 0.0  # drafting time from before a plain pass was seen
    _num_drafts: int = 0
    _levels: int | None = None  # of the latest draft
    _since_plain: int = 0  # steps since a pass without a draft

    def limits(self, rows: Sequence[Row], chain_only: bool) -> list[Limit]:
        is_first = any(row.num_steps == 0 for row in rows)  # its pass holds a prompt: no plain one
        rests = self.credit <= 0 or (not is_first and self._needs_plain(len(rows)))
        if rests:
            return [Limit(0, self.max_nodes, chain_only) for _ in rows]
        self._levels = self._num_levels(len(rows))
        return [Limit(row.num_left - 1, self.max_nodes, chain_only, self._levels) for row in rows]

    def _needs_plain(self, num_rows: int) -> bool:
        """Whether what drafts are compared with is unknown, known from few passes, or long past."""
        return self._since_plain + 1 >= min(1 << self.costs.count(num_rows, 1), 128)

    def _num_levels(self, num_rows: int) -> int | None:
        """How many levels pay best where each costs drafting time; deeper ones are tried a little at a time."""
        expected = self._depths.expected()
        known = len(expected) - 1
        if known < 1:
            return _FIRST_DEPTH
        plain = self.costs.curve(num_rows, 1)[0]
        draft = self._draft_costs.curve(num_rows, known + 1)
        if draft[-1] < 0.05 * plain:
            return None
        sizes = [math.ceil(self._nodes_per_level * depth) for depth in range(known + 1)]
        score = self.costs.curve(num_rows, 1 + sizes[-1])
        rates = [(1 + expected[d]) / (draft[d] + score[sizes[d]]) for d in range(1, known + 1)]
        best = 1 + max(range(known), key=rates.__getitem__)
        if best == known or self._num_drafts % 8 == 0:
            return best + 2
        return best

    def cut(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[TokenTree]:
        if any(len(tree) > 1 and (not tree.is_certain or not tree.estimates) for tree in trees):
            return list(trees)
        values = [self.calibration.values(tree) for tree in trees]
        most = max(len(tree) for tree in trees)
        curve = self.costs.curve(len(trees), most)
        ranked = [sorted(each[1:], reverse=True) for each in values]
        tokens, best_size, best_rate = float(len(trees)), 0, len(trees) / curve[0] * self.margin
        for size in range(1, most):
            tokens += sum(each[size - 1] for each in ranked if len(each) >= size)
            if tokens / curve[size] > best_rate:
                best_size, best_rate = size, tokens / curve[size]
        return [best_part(tree, each, best_size) for tree, each in zip(trees, values, strict=True)]

    def learn(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        verdicts: Sequence[Verdict],
        draft_s: float,
        score_s: float,
    ) -> None:
        columns = max(len(tree) for tree in trees)
        is_first = any(row.num_steps <= 1 for row in rows)  # such a pass holds a prompt
        if not is_first:
            self.costs.add(len(rows), columns, score_s)
            self._since_plain = 0 if columns == 1 else self._since_plain + 1
        for tree, verdict in zip(trees, verdicts, strict=True):
            if tree.estimates:
                accepted = set(verdict.nodes)
                for node in range(1, len(tree)):
                    self.calibration.learn(tree.estimates[node], node in accepted)
        self._learn_depth(trees, verdicts, draft_s)
        self._book(len(rows), 1 if is_first else columns, verdicts, draft_s)

    def _learn_depth(self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], draft_s: float) -> None:
        deepest = 0
        for tree, verdict in zip(trees, verdicts, strict=True):
            if len(tree) > 1:
                depth = max(tree.depths())
                if self._levels is not None:
                    depth = min(depth, self._levels)  # what is deeper came from a drafter that pays nothing for it
                deepest = max(deepest, depth)
                self._depths.learn(depth, verdict.num_accepted)
                self._nodes_per_level += 0.05 * ((len(tree) - 1) / depth - self._nodes_per_level)
        if deepest:
            self._num_drafts += 1
            self._draft_costs.add(len(trees), deepest + 1, draft_s)

    def _book(self, num_rows: int, columns: int, verdicts: Sequence[Verdict], draft_s: float) -> None:
        """What this step gained or lost against plain decoding, the pass at its usual cost."""
        self._unbooked_s += draft_s
        if not self.costs.knows(num_rows, 1):
            return
        curve = self.costs.curve(num_rows, columns)
        tokens = sum(len(verdict.tokens) for verdict in verdicts) / num_rows
        gain = tokens - (curve[-1] + self._unbooked_s) / curve[0]
        self._unbooked_s = 0.0
        self.credit = min(self.credit + gain + self.overhead, _MAX_CREDIT)


def make_budget(max_nodes: int, adaptive: bool, costs: PassCosts | None = None) -> Budget:
    """An AdaptiveBudget that starts from ``costs``, or a FixedBudget.

    Raises:
        ValueError: ``max_nodes`` is negative.
    """
    if max_nodes < 0:
        raise ValueError(f"max_nodes must be 0 or more, got {max_nodes}")
    return AdaptiveBudget(max_nodes, costs or PassCosts()) if adaptive else FixedBudget(max_nodes)
