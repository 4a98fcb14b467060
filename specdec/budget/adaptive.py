"""How large a step's trees may be: a fixed size, or what the machine and the drafts make worthwhile right now.

The adaptive budget learns as it goes what a pass costs, what a draft costs, and how often drafts come true. Each step
then takes the tree size that yields the most tokens a second, down to no draft at all. It decides by timing, so 16-bit
runs may differ in near ties from run to run; what is emitted stays exact, because only nodes picked with certainty are
ever left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specdec.budget.calibration import Calibration, DepthRates, NodeRates
from specdec.budget.costs import PassCosts, mean_context
from specdec.budget.timing import DraftCosts, PassTimer
from specdec.interfaces import Limit, Row, Verdict
from specdec.tree import TokenTree, best_part

_FIRST_DEPTH = 2
_FIRST_COLUMNS = 5
_GROWTH = 4  # sizes that were never tried: at most so many times the largest one that was
_MAX_CREDIT = 6.0  # so that what was gained long ago does not pay for much
_MAX_DEBT = 3.0  # so that one misjudged draft is not paid for by a whole text
_SURPRISE = 1.0  # passes: so much is booked of what may be a hiccup
_PATIENCE = 4  # drafts for which costs that forbid good ones are believed
_CATCH_UP = 2  # steps of rest after which a draft costs what it always does
_CHEAP = 0.05  # plain passes: the whole draft costs too little for its depth to matter


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
        pass_s: float,
    ) -> None:
        """What a step cost in wall seconds, drafting and the rest of it up to the verdict, and what was accepted."""


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
        pass_s: float,
    ) -> None: ...


@dataclass(slots=True)
class Lead:
    """Tokens a row gains in the time of a plain pass, of late: what a column must beat to be worth its time."""

    tokens: float = 4.0
    passes: float = 4.0

    def learn(self, tokens: float, passes: float) -> None:
        for_past = 1 - 1 / 24
        self.tokens = self.tokens * for_past + tokens
        self.passes = self.passes * for_past + passes

    @property
    def value(self) -> float:
        return max(1.0, self.tokens / self.passes)


@dataclass(slots=True)
class AdaptiveBudget:
    """The size that yields most tokens a second by what was learned; no draft where that is less than plain decoding.

    Trees with estimates and without drawn nodes are cut after drafting. Others are limited before it, by how often
    drafts were right so far, and so is the number of levels where these cost time. Drafting is switched off by an
    account, in passes of plain decoding: every draft books what it gained or lost at the usual costs, every step adds
    ``overhead``, and drafting waits while the account is empty. So a run is slower than plain decoding by little more
    than ``overhead``, the ``credit`` to begin with, and the drafts by which costs were found; a draft that loses little
    is tried often, a costly one rarely, and one that pays keeps itself going.

    Args:
        max_nodes: the largest tree, in nodes below the root.
        costs: what passes cost; shared between budgets of the same target and machine.
        margin: a larger tree must promise this much more than it costs.
        overhead: the share of plain decoding's time that may go into drafts that turn out useless.
        credit: what the account holds, in passes.
        in_line: rows stand one behind the other in a pass, so that its columns count in all: each row gets as many
            nodes as are worth their time; else all get as many as the widest.
    """

    max_nodes: int
    costs: PassCosts = field(default_factory=PassCosts)
    calibration: Calibration = field(default_factory=Calibration)
    margin: float = 1.02
    overhead: float = 0.015
    credit: float = 1.0
    in_line: bool = False
    lead: Lead = field(default_factory=Lead)
    _timer: PassTimer = field(init=False)
    _draft_costs: DraftCosts = field(init=False)
    _depths: DepthRates = field(default_factory=DepthRates)
    _nodes: NodeRates = field(default_factory=NodeRates)
    _can_cut: bool = True
    _nodes_per_level: float = 1.0
    _share: float = 1.0  # of rows that get a draft
    _tokens: float = 2.0  # of a row in a step with a draft
    _latest_tokens: float = 2.0  # in the latest few
    _num_drafts: int = 0
    _explored_at: int = 0  # the draft that was verified as it was
    _levels: int | None = None  # that were asked for in the latest step; 0: a step of rest
    _drafted_levels: int = 0  # that its drafts had before they were cut
    _rested: int = 0  # steps since the drafter was last asked
    _since_plain: int = 0  # steps since a pass without a draft
    _begun: set[Row] = field(default_factory=set)  # rows that the drafter has read

    def __post_init__(self) -> None:
        self._timer = PassTimer(self.costs)
        self._draft_costs = DraftCosts(self._timer)

    def limits(self, rows: Sequence[Row], chain_only: bool) -> list[Limit]:
        is_first = any(row.num_steps == 0 for row in rows)  # its pass holds a prompt: no plain one
        if self.credit <= 0 or (not is_first and self._needs_plain(rows)):
            self._levels = 0
            return [Limit(0, self.max_nodes, chain_only) for _ in rows]
        self._levels, nodes = self._size(rows)
        return [Limit(row.num_left - 1, nodes, chain_only, self._levels) for row in rows]

    def _needs_plain(self, rows: Sequence[Row]) -> bool:
        """Whether what drafts are compared with is unknown, known from few passes, or long past.

        A pass without a draft costs the tokens of one: about one percent of the time goes into these. The more tokens a
        draft brings, the less precisely need it be known at first.
        """
        if self._timer.wants_plain or not self._timer.knows_plain:
            return True
        late = 8 + 100 * (1 - 1 / self._tokens)
        num_plain = self._timer.num_plain(rows)
        return self._since_plain + 1 >= max(min(1 << num_plain, late), 4 * (self._tokens - 1))

    def _max_columns(self, rows: Sequence[Row]) -> int:
        """Columns grow by steps: a pass may cost as much as its columns."""
        return max(_FIRST_COLUMNS, _GROWTH * self.costs.largest(len(rows), mean_context(rows)))

    def _size(self, rows: Sequence[Row]) -> tuple[int | None, int]:
        """Levels (None: as many as there are) and nodes to be asked for."""
        tried = len(self._depths.trials)
        if not tried:
            return _FIRST_DEPTH, self.max_nodes
        is_known = len(self._draft_costs) > 1
        if self._can_cut and is_known and self._draft_costs.cost(self.max_nodes) < _CHEAP:
            return None, self.max_nodes
        growth = 1 if not any(self._depths.hits) else _GROWTH if is_known else 2
        most = min(self.max_nodes, math.ceil(self._nodes_per_level * tried * growth))
        if not self._can_cut:
            most = min(most, self._max_columns(rows) - 1)
        levels = [math.ceil(n / self._nodes_per_level - 1e-9) for n in range(most + 1)]
        reached = self._depths.expected(max(levels))
        expected = [reached[level] for level in levels]
        if not self._can_cut:
            guesses = [(reached[level] - reached[level - 1]) / self._nodes_per_level for level in levels[1:]]
            expected = self._nodes.expected(guesses)
        curve = self._timer.curve(rows, 1 + most)
        rates = [
            (1 + self._share * expected[n]) / (curve[n] / curve[0] + self._draft_costs.cost(levels[n]))
            for n in range(1, most + 1)
        ]
        outlays = [curve[n] / curve[0] + self._draft_costs.cost(levels[n]) - 1 for n in range(most + 1)]
        afforded = [n for n in range(1, most + 1) if n == 1 or outlays[n] <= self.credit + _MAX_DEBT]
        best = max(afforded, key=lambda n: rates[n - 1])
        if self._num_drafts % 16 == 15:
            best = min(best + 1 + best // 4, self.max_nodes)
        if not self._can_cut and self._explores():
            best = max(
                n for n in afforded if best <= n <= 2 * best + 1 and outlays[n] <= outlays[best] + self.credit / 2
            )
        level = max(1, math.ceil(best / self._nodes_per_level - 1e-9))
        return level, self.max_nodes if self._can_cut else best

    def cut(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[TokenTree]:
        most = max(len(tree) for tree in trees)
        self._drafted_levels = max(self._num_own_levels(tree) for tree in trees)
        if most == 1:
            return list(trees)
        self._can_cut = all(len(tree) == 1 or (tree.is_certain and bool(tree.estimates)) for tree in trees)
        if not self._can_cut:
            return list(trees)
        most = min(most, self._max_columns(rows))
        curve = self._timer.curve(rows, most)
        values = [self.calibration.values(tree) for tree in trees]
        sizes = self._sizes_in_line(values, curve) if self.in_line else [self._best_size(values, curve)] * len(trees)
        if self._explores() or (not any(sizes) and self._may_be_misled(values)):
            explored, self._explored_at = self._explored(curve), self._num_drafts
            sizes = [max(size, explored) for size in sizes]
        return [best_part(tree, each, size) for tree, each, size in zip(trees, values, sizes, strict=True)]

    def _sizes_in_line(self, values: Sequence[Sequence[float]], curve: Sequence[float]) -> list[int]:
        """The nodes of each row that bring more tokens than their time is worth, the best of all rows first."""
        num_rows, most = len(values), len(curve) - 1
        ranked = sorted(
            ((value, row) for row, each in enumerate(values) for value in sorted(each[1:], reverse=True)[:most]),
            key=lambda pair: -pair[0],
        )
        price = self.margin * self.lead.value * num_rows / curve[0]
        tokens, best_count, best_gain = 0.0, 0, 0.0
        for count, (value, _) in enumerate(ranked, 1):
            tokens += value
            below, part = divmod(count, num_rows)  # columns of all rows count together
            seconds = curve[below] + (part / num_rows * (curve[below + 1] - curve[below]) if part else 0.0)
            gain = tokens - price * (seconds - curve[0])
            if gain > best_gain:
                best_count, best_gain = count, gain
        chosen = Counter(row for _, row in ranked[:best_count])
        return [chosen[row] for row in range(num_rows)]

    def _best_size(self, values: Sequence[Sequence[float]], curve: Sequence[float]) -> int:
        """The nodes below the root that bring more tokens than their columns' time is worth."""
        ranked = [sorted(each[1:], reverse=True) for each in values]
        price = self.margin * self.lead.value * len(values) / curve[0]
        tokens, best_size, best_gain = 0.0, 0, 0.0
        for size in range(1, len(curve)):
            tokens += sum(each[size - 1] for each in ranked if len(each) >= size)
            gain = tokens - price * (curve[size] - curve[0])
            if gain > best_gain:
                best_size, best_gain = size, gain
        return best_size

    def _explores(self) -> bool:
        """Whether a tree is verified as it is: estimates too low to be tried would never be found too low."""
        n = self._num_drafts
        return n > 0 and (n % (32 if self.credit >= _MAX_CREDIT else 64) == 0 or n & (n - 1) == 0)

    def _may_be_misled(self, values: Sequence[Sequence[float]]) -> bool:
        """Whether drafts that promise much are only kept from being verified by costs that may have been a bad spell."""
        promised = sum(sum(each[1:]) for each in values) / len(values)
        return promised >= 1 and self.credit > 0 and self._num_drafts - self._explored_at >= _PATIENCE

    def _explored(self, curve: Sequence[float]) -> int:
        """The largest size that the account affords."""
        return max(size for size in range(len(curve)) if size <= 1 or curve[size] <= curve[0] * (1 + self.credit))

    def learn(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        verdicts: Sequence[Verdict],
        draft_s: float,
        pass_s: float,
    ) -> None:
        columns = self._num_columns(trees)
        is_first = any(row.num_steps <= 1 for row in rows)  # such a pass holds a prompt
        if not is_first:
            self._timer.add(rows, columns, pass_s)
            self._since_plain = 0 if columns == 1 else self._since_plain + 1
        for tree, verdict in zip(trees, verdicts, strict=True):
            if tree.estimates:
                accepted = set(verdict.nodes)
                for node in range(1, len(tree)):
                    parent = tree.parents[node]
                    above = tree.estimates[parent] if parent in accepted else None
                    self.calibration.learn(tree.estimates[node], node in accepted, above)
        self._learn_depth(trees, verdicts)
        is_usual = not is_first and self._rested <= _CATCH_UP and self._begun.issuperset(rows)
        if is_usual:
            self._draft_costs.add(rows, self._drafted_levels, draft_s)
        if self._timer.knows_plain:
            tokens = sum(len(verdict.tokens) for verdict in verdicts) / len(rows)
            seconds = pass_s * (columns > 1) + draft_s if is_usual else 0.0
            self._book(rows, 1 if is_first else columns, tokens, seconds)
        self._rested = self._rested + 1 if self._levels == 0 else 0
        self._begun = self._begun.intersection(rows) if self._levels == 0 else set(rows)

    def _num_columns(self, trees: Sequence[TokenTree]) -> int:
        """Columns of a row: of the widest, or on average where rows stand in one line."""
        sizes = list(map(len, trees))
        return math.ceil(sum(sizes) / len(sizes)) if self.in_line else max(sizes)

    def _book(self, rows: Sequence[Row], columns: int, tokens: float, seconds: float) -> None:
        """What this step gained or lost against plain decoding, at what it usually costs.

        Costs are taken to be low until they are known: so little is booked as gained, and a surprise is booked in part.
        """
        self._draft_costs.refit()
        curve = self._timer.curve(rows, columns)
        passes = curve[-1] / curve[0] + self._draft_costs.cost(self._drafted_levels)
        self.lead.learn(tokens, passes)
        gain = tokens - passes
        is_known = self._timer.knows(rows, columns) and (not self._drafted_levels or self._draft_costs.is_known)
        if not is_known:
            surprise = seconds / curve[0] - passes
            gain = min(gain, _SURPRISE) - min(max(surprise, 0.0), _SURPRISE)
        if gain < -_SURPRISE and self.credit + gain <= 0 and self._since_plain > _PATIENCE:
            # Before drafting stops for this: perhaps plain passes are as slow by now.
            gain, self._timer.wants_plain = -_SURPRISE, True
        self.credit = max(-_MAX_DEBT, min(self.credit + gain + self.overhead, _MAX_CREDIT))

    def _learn_depth(self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict]) -> None:
        if not self._drafted_levels:
            return
        self._num_drafts += 1
        weight = max(0.05, 1 / (self._num_drafts + 1))
        num_drafted = sum(len(tree) > 1 for tree in trees)
        self._share += weight * (num_drafted / len(trees) - self._share)
        tokens = sum(len(verdict.tokens) for verdict in verdicts) / len(trees)
        self._tokens += weight * (tokens - self._tokens)
        self._latest_tokens += (tokens - self._latest_tokens) / 2
        for tree, verdict in zip(trees, verdicts, strict=True):
            if len(tree) > 1:
                depth = self._num_own_levels(tree)
                self._depths.learn(depth, verdict.num_accepted)
                if not self._can_cut:
                    self._nodes.learn(len(tree) - 1, verdict.nodes[1:])
                self._nodes_per_level += weight * ((len(tree) - 1) / depth - self._nodes_per_level)

    def _num_own_levels(self, tree: TokenTree) -> int:
        """Levels that a drafter was asked for: what is deeper came from one that pays nothing for it."""
        depth = max(tree.depths())
        return min(depth, self._levels) if self._levels else depth


def make_budget(max_nodes: int, adaptive: bool, costs: PassCosts | None = None, in_line: bool = False) -> Budget:
    """An AdaptiveBudget that starts from ``costs``, or a FixedBudget; ``in_line`` as there.

    Raises:
        ValueError: ``max_nodes`` is negative.
    """
    if max_nodes < 0:
        raise ValueError(f"max_nodes must be 0 or more, got {max_nodes}")
    return AdaptiveBudget(max_nodes, costs or PassCosts(), in_line=in_line) if adaptive else FixedBudget(max_nodes)
