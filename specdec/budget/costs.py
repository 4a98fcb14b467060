"""What passes cost: robust, by rows, columns and context.

Times are one-sided: a pass is never faster than it can be, and now and then much slower (another process, a graph that
is captured, a kernel that is compiled). So nothing here trusts a single time. Letters: R rows, n columns of a pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import median_low

from specdec.budget.medians import rising, weighted_median
from specdec.interfaces import Row

Cell = tuple[int, int | None]  # octaves of rows and of context; None: whatever the context

ENOUGH = 3  # times of a size that outvote one hiccup among them
_NUM_RECENT = 15
_HALF_LIFE = 128  # passes of the table until a time counts half: conditions change within a text
_REFRESH = 16  # passes of a cell until what it borrows from others is scaled anew
_NEAR = 2  # octaves: so far away a curve still has about the same shape


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


@dataclass(frozen=True, slots=True)
class _Timed:
    """A time as it counts in some cell: in seconds of that cell, by a share of its weight."""

    columns: int
    seconds: float
    serial: int
    share: float


@dataclass(frozen=True, slots=True)
class _Size:
    """What is known of one size in one cell: mean columns, its times, their lower median, and their median by weight."""

    columns: float
    times: Sequence[float]
    low: float
    median: float


@dataclass(slots=True)
class _Curve:
    """A cell's points (columns, seconds), rising, and what they give for 1, 2, ... columns."""

    points: Sequence[tuple[float, float]]
    seconds: list[float] = field(default_factory=list)


@dataclass(slots=True)
class PassCosts:
    """Seconds of a pass by (rows, context, columns): medians of recent ones, never falling with columns.

    Rows and contexts fall into cells, an octave each. Where a cell has few times of a size, those of the nearest cells
    are added, scaled by the sizes that were timed in both: batches that grow and shrink, and texts that get longer, do
    not begin from nothing. A size that was timed
    once or twice is taken to cost no more than the smaller sizes let expect, unless both times say so.

    Threads that run one model share its costs: one may add a size while another one looks.

    Args:
        slope: what one more column costs, as a share of a pass, where nothing larger was seen.
    """

    slope: float = 0.03
    _cells: dict[Cell, dict[int, deque[PassTime]]] = field(default_factory=dict)
    _num_added: int = 0
    _largest: dict[Cell, int] = field(default_factory=dict)
    _counts: dict[Cell, int] = field(default_factory=dict)  # of all times that were added
    # What follows from the times. Each is replaced, never emptied: who still computes from older times fills the old one.
    _nearest: dict[Cell, list[Cell]] = field(default_factory=dict)
    _sizes: dict[int, dict[Cell, _Size | None]] = field(default_factory=dict)
    _curves: dict[Cell, _Curve] = field(default_factory=dict)

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
        cell, size = cell_of(num_rows, context), _size_class(num_columns)
        if cell not in self._cells:
            self._cells[cell] = {}
            self._nearest = {}
        self._cells[cell].setdefault(size, deque(maxlen=_NUM_RECENT)).append(time)
        self._largest[cell] = max(num_columns, self._largest.get(cell, 0))
        self._counts[cell] = count = self._counts.get(cell, 0) + 1
        if count < _REFRESH // 2 or count % _REFRESH == 0:
            self._sizes = {}
        else:
            self._sizes[size] = {}
        self._curves = {}
        return time

    def at_pace(self, times: Iterable[PassTime], pace: float) -> None:
        """Correct the pace at which passes were noted."""
        for time in times:
            time.pace = pace
        self._sizes = {}
        self._curves = {}

    def count(self, num_rows: int, num_columns: int, context: float | None = None) -> int:
        """How many recent passes of about this size are known under about these conditions."""
        here, size = cell_of(num_rows, context), _size_class(num_columns)
        near = takewhile(lambda cell: _distance(cell, here) <= _NEAR, self._near(here))
        return sum(len(self._cells[cell].get(size, ())) for cell in near if cell in self._cells)

    def knows(self, num_rows: int, num_columns: int, context: float | None = None) -> bool:
        return self.count(num_rows, num_columns, context) > 0

    @property
    def knows_plain(self) -> bool:
        """Whether any pass of one column was timed, whatever the rows and the context."""
        return any(1 in sizes for sizes in tuple(self._cells.values()))

    def largest(self, num_rows: int, context: float | None = None) -> int:
        """The most columns that were timed under about these conditions; 0: none were."""
        here = cell_of(num_rows, context)
        return max((n for cell, n in tuple(self._largest.items()) if _distance(cell, here) <= _NEAR), default=0)

    def curve(self, num_rows: int, max_columns: int, context: float | None = None) -> list[float]:
        """Seconds for 1 to ``max_columns`` columns."""
        curve = self._curve(cell_of(num_rows, context))
        if len(curve.seconds) < max_columns:
            curve.seconds = self._seconds(curve.points, max_columns)
        return curve.seconds[:max_columns]

    def _curve(self, here: Cell) -> _Curve:
        curves = self._curves
        curve = curves.get(here)
        if curve is None:
            curve = curves[here] = self._fitted(here)
        return curve

    def _fitted(self, here: Cell) -> _Curve:
        classes = sorted({size for sizes in tuple(self._cells.values()) for size in tuple(sizes)})
        known = [size for size in (self._size(here, each) for each in classes) if size]
        lows = [size.low for size in known]
        points: list[tuple[float, float, int]] = []
        for i, size in enumerate(known):
            if len(size.times) >= ENOUGH:
                seconds = size.median
            else:
                expected = lows[i + 1 :]  # no larger pass takes less
                if points:
                    slope = _per_column([(n, s) for n, s, count in points if count > 1])
                    expected.append(
                        points[-1][1] + (slope or self.slope * points[0][1]) * (size.columns - points[-1][0])
                    )
                seconds = median_low([*size.times, *([min(expected)] if expected else [])])
            points.append((size.columns, seconds, len(size.times)))
        return _Curve(rising(points))

    def _size(self, here: Cell, size: int) -> _Size | None:
        sizes = self._sizes.setdefault(size, {})
        if here in sizes:
            return sizes[here]
        found = self._times(here, size, 1.0)
        for cell in self._near(here)[1:]:
            if len(found) >= ENOUGH:
                break
            if size in self._cells[cell]:
                found += self._times(cell, size, 0.5 ** _distance(cell, here), self._scale(cell, here))
        sizes[here] = _summed_up(found) if found else None
        return sizes[here]

    def _near(self, here: Cell) -> list[Cell]:
        """All cells, this one and the nearest first."""
        nearest = self._nearest
        if here not in nearest:
            others = sorted(self._cells, key=lambda cell: _distance(cell, here))
            nearest[here] = [here, *(cell for cell in others if cell != here)]
        return nearest[here]

    def _times(self, cell: Cell, size: int, share: float, scale: float = 1.0) -> list[_Timed]:
        times = tuple(self._cells.get(cell, {}).get(size, ()))
        return [_Timed(time.columns, scale * time.usual_s, time.serial, share) for time in times]

    def _scale(self, cell: Cell, here: Cell) -> float:
        """How many times longer passes take ``here`` than in another cell, by the sizes that were timed in both."""
        one, other = self._cells.get(here, {}), self._cells[cell]
        ratios = [_low(one[size]) / _low(other[size]) for size in tuple(one) if size in other]
        return median_low(ratios) if ratios else 1.0

    def _seconds(self, points: Sequence[tuple[float, float]], max_columns: int) -> list[float]:
        """Between points straight lines; beyond them at least ``slope``."""
        if not points:
            return [1.0 + self.slope * n for n in range(max_columns)]
        n0, t0 = points[0]
        seconds = [t0 / (1 + self.slope * (n0 - n)) for n in range(1, min(math.ceil(n0) - 1, max_columns) + 1)]
        for n1, t1 in points[1:]:
            step = (t1 - t0) / (n1 - n0)
            for n in range(len(seconds) + 1, min(math.ceil(n1) - 1, max_columns) + 1):
                seconds.append(t0 + step * (n - n0))
            n0, t0 = n1, t1
        step = max(self.slope * points[0][1], _per_column(points))
        return seconds + [t0 + step * (n - n0) for n in range(len(seconds) + 1, max_columns + 1)]


def _low(times: Iterable[PassTime]) -> float:
    return median_low([time.usual_s for time in tuple(times)])


def _summed_up(found: Sequence[_Timed]) -> _Size:
    newest = max(time.serial for time in found)
    weighted = [(time.seconds, time.share * 0.5 ** ((newest - time.serial) / _HALF_LIFE)) for time in found]
    columns = sum(time.columns for time in found) / len(found)
    seconds = [time.seconds for time in found]
    return _Size(columns, seconds, median_low(seconds), weighted_median(weighted))


def _per_column(points: Sequence[tuple[float, float]]) -> float:
    """Seconds of one more column between the smallest and the largest size; 0: there is only one."""
    if len(points) < 2:
        return 0.0
    (n0, t0), (n1, t1) = points[0], points[-1]
    return max(0.0, (t1 - t0) / (n1 - n0))


def mean_context(rows: Sequence[Row]) -> float:
    """Tokens of context that a row of a pass reads."""
    return sum(len(row.tokens) for row in rows) / len(rows)


def cell_of(num_rows: int, context: float | None) -> Cell:
    """Where passes of so many rows and so much context are noted."""
    return round(math.log2(num_rows)), None if context is None else round(math.log2(max(context, 1.0)))


def _distance(one: Cell, other: Cell) -> int:
    """Octaves between two cells."""
    apart = 0 if one[1] is None or other[1] is None else abs(one[1] - other[1])
    return abs(one[0] - other[0]) + apart


def _size_class(columns: int) -> int:
    """Sizes that are timed together: one to four each alone, then two to an octave."""
    return columns if columns <= 4 else 2 + math.ceil(2 * math.log2(columns) - 1e-9)
