"""What passes and drafts cost: robust, by rows, columns and context, in step with a machine whose speed changes.

Times are one-sided: a pass is never faster than it can be, and now and then much slower (another process, a graph that
is captured, a kernel that is compiled). So nothing here trusts a single time. Letters: R rows, n columns of a pass.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

from specdec.interfaces import Row

Cell = tuple[int, int | None]  # octaves of rows and of context; None: whatever the context

ENOUGH = 3  # times of a size that outvote one hiccup among them
_NUM_RECENT = 15
_HALF_LIFE = 128  # passes of the table until a time counts half: conditions change within a text
_NEAR = 2  # octaves: so far away a curve still has about the same shape
_WINDOW = 7  # passes that tell how slow the machine is
_STEADY = 0.4  # logarithm: changes of the median of so many passes that noise of a fifth does not make


@dataclass(slots=True)
class PassTime:
    """One pass that was timed. ``pace``: how many times slower than usual the machine was just then."""

    columns: int
    seconds: float
    serial: int
    pace: float = 1.0

    @property
    def usual_s(self) -> float:
        return self.seconds / self.pace


@dataclass(slots=True)
class PassCosts:
    """Seconds of a pass by (rows, context, columns): medians of recent ones, never falling with columns.

    Rows and contexts fall into cells, an octave each. Where a cell has few times of a size, those of the nearest cells
    are added: batches that grow and shrink, and texts that get longer, do not begin from nothing. A size that was timed
    once or twice is taken to cost no more than the smaller sizes let expect, unless both times say so.

    Threads that run one model share its costs: one may add a size while another one looks.

    Args:
        slope: what one more column costs, as a share of a pass, where nothing larger was seen.
    """

    slope: float = 0.03
    _cells: dict[Cell, dict[int, deque[PassTime]]] = field(default_factory=dict)
    _num_added: int = 0
    _known: dict[Cell, list[tuple[float, float]]] = field(default_factory=dict)  # curves since the last change

    @classmethod
    def seeded(cls, curves: Mapping[int, Mapping[int, float]]) -> PassCosts:
        """Costs measured earlier, number of rows -> columns -> seconds; what is seen from now on replaces them."""
        costs = cls()
        for num_rows, curve in curves.items():
            for num_columns, seconds in curve.items():
                for _ in range(ENOUGH):
                    costs.add(num_rows, num_columns, seconds)
        return costs

    def add(self, num_rows: int, num_columns: int, seconds: float, context: float | None = None) -> PassTime:
        """Note a pass; the ``pace`` of what is returned may be set later, when it is known."""
        self._num_added += 1
        time = PassTime(num_columns, seconds, self._num_added)
        sizes = self._cells.setdefault(_cell(num_rows, context), {})
        sizes.setdefault(_size_class(num_columns), deque(maxlen=_NUM_RECENT)).append(time)
        self._known = {}
        return time

    def at_pace(self, times: Iterable[PassTime], pace: float) -> None:
        """Correct the pace at which passes were noted."""
        for time in times:
            time.pace = pace
        self._known = {}

    def count(self, num_rows: int, num_columns: int, context: float | None = None, radius: float = _NEAR) -> int:
        """How many recent passes of about this size are known, at most ``radius`` octaves of rows and context away."""
        here, size = _cell(num_rows, context), _size_class(num_columns)
        near = [len(s.get(size, ())) for cell, s in tuple(self._cells.items()) if _distance(cell, here) <= radius]
        return sum(near)

    def knows(self, num_rows: int, num_columns: int, context: float | None = None, radius: float = _NEAR) -> bool:
        return self.count(num_rows, num_columns, context, radius) > 0

    def largest(self, num_rows: int, context: float | None = None) -> int:
        """The most columns that were timed under about these conditions; 0: none were."""
        here = _cell(num_rows, context)
        near = [sizes for cell, sizes in tuple(self._cells.items()) if _distance(cell, here) <= _NEAR]
        return max(
            (time.columns for sizes in near for times in tuple(sizes.values()) for time in tuple(times)), default=0
        )

    def curve(self, num_rows: int, max_columns: int, context: float | None = None) -> list[float]:
        """Seconds for 1 to ``max_columns`` columns."""
        here, known = _cell(num_rows, context), self._known
        points = known.get(here)
        if points is None:
            points = known[here] = self._points(here)
        if not points:
            return [1.0 + self.slope * n for n in range(max_columns)]
        return [self._at(points, n) for n in range(1, max_columns + 1)]

    def _points(self, here: Cell) -> list[tuple[float, float]]:
        """(columns, seconds) of each size that is known, rising."""
        cells = list(self._cells.items())  # another thread may add one meanwhile
        cells.sort(key=lambda item: _distance(item[0], here))
        near = [(0.5 ** _distance(cell, here), sizes) for cell, sizes in cells]
        classes = sorted({size for _, sizes in near for size in tuple(sizes)})
        known = [times for times in (self._relevant(near, size) for size in classes) if times]
        columns = [sum(time.columns for time, _ in times) / len(times) for times in known]
        lows = [median_low(time.usual_s for time, _ in times) for times in known]
        points: list[tuple[float, float, int]] = []
        for i, times in enumerate(known):
            if len(times) >= ENOUGH:
                seconds = weighted_median([(time.usual_s, weight) for time, weight in times])
            else:
                expected = lows[i + 1 :]  # no larger pass takes less
                if points:
                    slope = self._per_column([(n, s) for n, s, count in points if count > 1])
                    expected.append(points[-1][1] + (slope or self.slope * points[0][1]) * (columns[i] - points[-1][0]))
                seconds = median_low([*(time.usual_s for time, _ in times), *([min(expected)] if expected else [])])
            points.append((columns[i], seconds, len(times)))
        return _rising(points)

    @staticmethod
    def _per_column(points: Sequence[tuple[float, float]]) -> float:
        """Seconds of one more column between the smallest and the largest size; 0: there is only one."""
        if len(points) < 2:
            return 0.0
        (n0, t0), (n1, t1) = points[0], points[-1]
        return max(0.0, (t1 - t0) / (n1 - n0))

    def _relevant(
        self, near: Sequence[tuple[float, Mapping[int, deque[PassTime]]]], size: int
    ) -> list[tuple[PassTime, float]]:
        """Times of one size and what each counts: those of the first cell, and of the next ones if these are few."""
        found: list[tuple[PassTime, float]] = []
        for share, sizes in near:
            if len(found) >= ENOUGH:
                break
            for time in tuple(sizes.get(size, ())):
                found.append((time, share * 0.5 ** ((self._num_added - time.serial) / _HALF_LIFE)))
        return found

    def _at(self, known: Sequence[tuple[float, float]], columns: int) -> float:
        place = bisect_right([size for size, _ in known], columns)
        if place == 0:
            n, seconds = known[0]
            return seconds / (1 + self.slope * (n - columns))
        n0, t0 = known[place - 1]
        if place == len(known):
            return t0 + max(self.slope * known[0][1], self._per_column(known)) * (columns - n0)
        n1, t1 = known[place]
        return t0 + (t1 - t0) * (columns - n0) / (n1 - n0)


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
        cell = _cell(num_rows, context)
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
        return self.costs.knows(1, 1, radius=math.inf)

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
        self._is_stale = self._is_stale or len(self._drafts) < 2 * ENOUGH or self._num_added % 8 == 0

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
            cell = _cell(time.num_rows, time.context)
            if cell not in plain:
                plain[cell] = self.timer.costs.curve(time.num_rows, 1, time.context)[0]
        idle = median_low([t.usual_s / plain[_cell(t.num_rows, t.context)] for t in self._idle] or [0.0])
        drafts = [(t.levels, max(0.0, t.usual_s / plain[_cell(t.num_rows, t.context)] - idle)) for t in self._drafts]
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


def mean_context(rows: Sequence[Row]) -> float:
    """Tokens of context that a row of a pass reads."""
    return sum(len(row.tokens) for row in rows) / len(rows)


def _cell(num_rows: int, context: float | None) -> Cell:
    return round(math.log2(num_rows)), None if context is None else round(math.log2(max(context, 1.0)))


def _distance(one: Cell, other: Cell) -> int:
    """Octaves between two cells."""
    apart = 0 if one[1] is None or other[1] is None else abs(one[1] - other[1])
    return abs(one[0] - other[0]) + apart


def _size_class(columns: int) -> int:
    """Sizes that are timed together: one to four each alone, then two to an octave."""
    return columns if columns <= 4 else 2 + math.ceil(2 * math.log2(columns) - 1e-9)


def weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """The value at which half of the weight is reached."""
    ranked = sorted(values)
    half, reached = sum(weight for _, weight in ranked) / 2, 0.0
    for value, weight in ranked:
        reached += weight
        if reached >= half - 1e-12:
            return value
    raise ValueError("no values")


def _rising(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """(size, seconds, weight) with seconds averaged where they fall with size: one lucky time must not decide."""
    pools: list[tuple[float, int, list[float]]] = []  # mean seconds, weight, sizes
    for size, seconds, weight in points:
        sizes = [size]
        while pools and pools[-1][0] > seconds:
            mean, other, before = pools.pop()
            seconds = (mean * other + seconds * weight) / (other + weight)
            weight += other
            sizes = before + sizes
        pools.append((seconds, weight, sizes))
    return [(size, seconds) for seconds, _, sizes in pools for size in sizes]
