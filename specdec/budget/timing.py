"""One run's view of what things cost: passes at the pace the machine has just now, and drafts in passes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

from specdec.budget.costs import ENOUGH, Cell, PassCosts, PassTime, cell_of, mean_context
from specdec.interfaces import Row

_WINDOW = 7  # passes that tell how slow the machine is
_STEADY = 0.4  # logarithm: changes of the median of so many passes that noise of a fifth does not make


@dataclass(slots=True)
class PassTimer:
    """One run's view of the costs: the table, times how slow the machine is at the moment.

    The pace is how much longer than usual passes take of late; times go into the table as they would be at the usual
    pace. One slow pass is a hiccup. Where most of the recent ones differ a pass without a draft is asked for
    (``wants_plain``): if it differs as much, the machine has changed its pace; if it does not, larger passes have
    changed their cost.
    """

    costs: PassCosts
    pace: float = 1.0
    wants_plain: bool = False
    _recent: deque[tuple[PassTime, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # with paces
    _cell: Cell | None = None
    _asked: int = 0  # passes until a plain one may be asked for again

    def add(self, rows: Sequence[Row], num_columns: int, seconds: float) -> None:
        num_rows, context = len(rows), mean_context(rows)
        cell = cell_of(num_rows, context)
        if cell != self._cell:  # what was usual there need not be here
            self._recent.clear()
            self._cell = cell
        # Only against a size that is well known: else the pace would take up what the size really costs.
        is_known = self.costs.count(num_rows, num_columns, context) >= ENOUGH
        usual_s = self.costs.curve(num_rows, num_columns, context)[-1] if is_known else None
        time = self.costs.add(num_rows, num_columns, seconds, context)
        time.pace = self.pace
        self._asked = max(0, self._asked - 1)
        self.wants_plain = False
        if usual_s is not None:
            self._recent.append((time, seconds / usual_s))
            self._follow()

    def _follow(self) -> None:
        """Change the pace if most of the recent passes, a plain one among them, say so."""
        found = median(pace for _, pace in self._recent)
        if len(self._recent) < _WINDOW or not self._differs(found):
            return
        plain = [pace for time, pace in self._recent if time.columns == 1]
        if plain and self._differs(plain[-1]) and (plain[-1] > self.pace) == (found > self.pace):
            self.pace = found
            self.costs.at_pace((time for time, pace in self._recent if abs(math.log(pace / found)) < _STEADY), found)
        elif not self._asked:
            self.wants_plain = True
            self._asked = _WINDOW

    def _differs(self, pace: float) -> bool:
        return abs(math.log(pace / self.pace)) > _STEADY

    def curve(self, rows: Sequence[Row], max_columns: int) -> list[float]:
        """Seconds for 1 to ``max_columns`` columns, now."""
        return [self.pace * seconds for seconds in self.costs.curve(len(rows), max_columns, mean_context(rows))]

    def knows(self, rows: Sequence[Row], num_columns: int) -> bool:
        """Whether enough passes of this size were timed that one hiccup among them does not count."""
        return self.costs.count(len(rows), num_columns, mean_context(rows)) >= ENOUGH

    @property
    def knows_plain(self) -> bool:
        """Whether any pass without drafts was timed."""
        return self.costs.knows_plain

    def num_plain(self, rows: Sequence[Row]) -> int:
        """How many passes without drafts are known under about these conditions."""
        return self.costs.count(len(rows), 1, mean_context(rows))


@dataclass(slots=True)
class DraftCosts:
    """What a draft of so many levels costs, in passes of plain decoding: a robust line (Theil and Sen).

    In passes it holds for other batches, texts and paces too. How long these take may be found later than the drafts'
    seconds, so both are kept.
    """

    timer: PassTimer
    _drafts: deque[DraftTime] = field(default_factory=lambda: deque(maxlen=15))
    _idle: deque[DraftTime] = field(default_factory=lambda: deque(maxlen=15))
    _line: tuple[float, float] = (0.0, 0.0)
    _num_added: int = 0
    _is_stale: bool = False

    def add(self, rows: Sequence[Row], levels: int, seconds: float) -> None:
        """Note what the drafter took; 0 levels: in a step without a draft."""
        time = DraftTime(levels, seconds / self.timer.pace, len(rows), mean_context(rows))
        (self._drafts if levels else self._idle).append(time)
        self._num_added += 1
        # Once it is known it changes slowly, and finding it takes time itself.
        self._is_stale = self._is_stale or len(self._drafts) < 2 * ENOUGH or self._num_added % 16 == 0

    @property
    def is_known(self) -> bool:
        return len(self._drafts) >= ENOUGH

    def __len__(self) -> int:
        return len(self._drafts)

    def refit(self) -> None:
        """Take account of all that was noted since."""
        if self._is_stale:
            self._line = self._fitted()
            self._is_stale = False

    def cost(self, levels: float) -> float:
        """Passes of plain decoding that drafting takes beyond what an idle drafter does."""
        base, level = self._line
        return base + level * levels if levels else 0.0

    def _fitted(self) -> tuple[float, float]:
        """(base, level); nothing for a single draft, which may have been a hiccup: the next one tells."""
        plain: dict[Cell, float] = {}
        for time in (*self._drafts, *self._idle):
            cell = cell_of(time.num_rows, time.context)
            if cell not in plain:
                plain[cell] = self.timer.costs.curve(time.num_rows, 1, time.context)[0]
        idle = median_low([t.usual_s / plain[cell_of(t.num_rows, t.context)] for t in self._idle] or [0.0])
        drafts = [(t.levels, max(0.0, t.usual_s / plain[cell_of(t.num_rows, t.context)] - idle)) for t in self._drafts]
        if len(drafts) < 2:
            return 0.0, 0.0
        shares = [passes / levels for levels, passes in drafts]
        if len(drafts) < ENOUGH:
            return 0.0, min(shares)
        slopes = [(b - a) / (m - n) for i, (m, b) in enumerate(drafts) for n, a in drafts[:i] if m != n]
        level = min(max(0.0, median(slopes)), median(shares)) if slopes else median(shares)
        return max(0.0, median(passes - level * levels for levels, passes in drafts)), level


@dataclass(frozen=True, slots=True)
class DraftTime:
    """One draft that was timed, at the usual pace of the machine."""

    levels: int
    usual_s: float
    num_rows: int
    context: float
