"""Why a method is as fast as it is: the measured speedup, and the cost model S = tau / (v(n) + d c + o).

All costs are in passes of plain decoding: tau tokens a step, v(n) a pass with n columns, d levels of drafting at c each,
o everything else. Seconds of a pass are modelled as a + b x columns, which is what separates a machine that waits for
memory (b small) from one that computes (b large).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.analysis.columns import BASELINE, PLAIN, Floats, Ints, Trace
from specdec.analysis.intervals import Estimate, geometric_mean
from specdec.analysis.nodes import tree_shapes

MIN_PASSES = 3  # a size seen less often tells nothing of its cost


@dataclass(frozen=True, slots=True)
class Passes:
    """Columns of the target's passes (P,) after the first of each answer, which holds the prompt."""

    name: NDArray[np.str_]  # of the method
    num_rows: Ints
    columns: Ints  # rows x nodes of the widest tree
    score_s: Floats
    draft_s: Floats
    verify_s: Floats


@dataclass(frozen=True, slots=True)
class CostPoint:
    """What passes of one size took."""

    columns: int
    num_passes: int
    median_s: float
    low_s: float  # quartiles
    high_s: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a pass: ``fixed_s`` + ``column_s`` x columns; of drafting one level; and of the rest of a step."""

    fixed_s: float
    column_s: float
    level_s: float
    other_s: float

    def pass_s(self, columns: float) -> float:
        return self.fixed_s + self.column_s * columns

    def v(self, columns: float, num_rows: int = 1) -> float:
        """A pass of ``columns`` a row in passes of plain decoding."""
        return self.pass_s(columns * num_rows) / self.pass_s(num_rows)

    def speedup(self, tau: float, columns: float, levels: float, num_rows: int = 1) -> float:
        """Against plain decoding, for ``tau`` tokens a row and step, trees of ``columns`` nodes with their root."""
        plain_s = self.pass_s(num_rows) + self.other_s
        return tau * plain_s / (self.pass_s(columns * num_rows) + levels * self.level_s + self.other_s)

    def break_even_rows(self, tau: float, columns: float, levels: float) -> float:
        """The batch size from which on this draft is slower than none: inf if never, 0 if it is from the start.

        tau (a + b B + o) = a + b B n + d c + o is linear in B.
        """
        gain = tau * (self.fixed_s + self.other_s) - self.fixed_s - levels * self.level_s - self.other_s
        loss = self.column_s * (columns - tau)  # for each further row
        if loss <= 0:
            return float("inf") if gain + tau * self.column_s > self.column_s * columns else 0.0
        return max(gain / loss, 0.0)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The cost model beside the clock, for one method, against plain decoding after the prompt."""

    name: str
    tau: float  # tokens a step after the first
    columns: float  # mean nodes of a tree, root included
    levels: float  # mean depth of a tree
    predicted: float
    measured: Estimate


def speedups(trace: Trace, baseline: str = BASELINE, *, decode_only: bool = False) -> dict[str, Estimate]:
    """Each method's tokens per second over the baseline's, as ``specdec bench`` counts: a geometric mean over groups.

    ``decode_only`` leaves out the first pass of each output with its tokens; only methods of ours tell these apart.

    Raises:
        ValueError: the trace does not hold the baseline.
    """
    if baseline not in trace.names:
        raise ValueError(f"the trace has no method {baseline!r} to compare with; it has {', '.join(trace.names)}")
    measured = rates(trace, decode_only=decode_only)
    reference = measured[baseline]
    result = {}
    for name, own in measured.items():
        shared = [group for group in own if group in reference]
        if shared:
            ratios = [own[group].tokens_per_s / reference[group].tokens_per_s for group in shared]
            result[name] = geometric_mean(ratios, [own[group].num_questions for group in shared])
    return result


@dataclass(slots=True)
class GroupRate:
    """What a method made of one group of questions in all turns."""

    num_tokens: int = 0
    seconds: float = 0.0
    num_questions: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def rates(trace: Trace, *, decode_only: bool = False) -> dict[str, dict[tuple[int, int], GroupRate]]:
    """Method -> (run, group) -> what it made of the group; the seconds of a batch count once."""
    first = _first_tokens(trace) if decode_only else {}
    by_method: dict[str, dict[tuple[int, int], GroupRate]] = {}
    seen: set[tuple[str, int, int, int]] = set()
    questions: dict[tuple[str, int, int], set[str]] = {}
    for output in trace.outputs:
        label = output.label
        key = (label.run, output.group)
        rate = by_method.setdefault(label.name, {}).setdefault(key, GroupRate())
        rate.num_tokens += output.num_tokens - first.get((label.name, label.run, label.question_id, label.turn), 0)
        if (label.name, *key, label.turn) not in seen:
            seen.add((label.name, *key, label.turn))
            rate.seconds += output.wall_s - (output.prefill_s if decode_only else 0.0)
        members = questions.setdefault((label.name, *key), set())
        members.add(label.question_id)
        rate.num_questions = len(members)
    return {
        name: {k: r for k, r in groups.items() if r.num_tokens and r.seconds > 0} for name, groups in by_method.items()
    }


def passes(trace: Trace) -> Passes:
    """Every pass of ours but the first of each answer. Rows of one pass stand behind each other with equal seconds."""
    steps = trace.steps
    names = trace.column("name")
    if not len(steps):
        return Passes(names[:0], *(np.zeros(0, np.int64),) * 2, *(np.zeros(0),) * 3)
    differs = np.ones(len(steps), np.bool_)
    same = (steps.score_s[1:] == steps.score_s[:-1]) & (steps.verify_s[1:] == steps.verify_s[:-1])
    differs[1:] = ~same | (names[1:] != names[:-1])
    starts = np.flatnonzero(differs)
    widths = np.maximum.reduceat(steps.num_drafted + 1, starts)
    later = np.minimum.reduceat(steps.index, starts) > 0
    starts, widths = starts[later], widths[later]
    rows = steps.num_rows[starts]
    seconds = (column[starts] * rows for column in (steps.score_s, steps.draft_s, steps.verify_s))
    return Passes(names[starts], rows, rows * widths, *seconds)


def cost_curve(trace: Trace) -> list[CostPoint]:
    """v(n) as it was met on the way: seconds of the passes of each size that occurred at least three times."""
    timed = passes(trace)
    points = []
    for columns in np.unique(timed.columns):
        seconds = timed.score_s[timed.columns == columns]
        if len(seconds) >= MIN_PASSES:
            low, median, high = np.percentile(seconds, [25, 50, 75])
            points.append(CostPoint(int(columns), len(seconds), float(median), float(low), float(high)))
    return points


def fit(trace: Trace) -> CostModel:
    """The cost model of a run: a weighted line through the medians of ``cost_curve``, medians of the rest.

    Raises:
        ValueError: passes of fewer than two sizes.
    """
    points = cost_curve(trace)
    if len(points) < 2:
        raise ValueError("a cost model needs passes of two sizes at least: give a trace with plain and a drafter")
    columns = np.array([point.columns for point in points], np.float64)
    medians = np.array([point.median_s for point in points])
    weights = np.sqrt([point.num_passes for point in points])
    # Relative errors count: an error of a millisecond matters more in a short pass.
    column_s, fixed_s = np.polyfit(columns, medians, 1, w=weights / medians)
    steps = trace.steps
    levels = tree_shapes(trace).levels
    drafting = (levels > 0) & (steps.index > 0)
    level_s = (
        float(np.median(steps.draft_s[drafting] * steps.num_rows[drafting] / levels[drafting]))
        if any(drafting)
        else 0.0
    )
    later = steps.index > 0
    other_s = float(np.median(steps.verify_s[later] * steps.num_rows[later])) if any(later) else 0.0
    return CostModel(float(fixed_s), float(max(column_s, 0.0)), level_s, other_s)


def predict(trace: Trace, model: CostModel) -> list[Prediction]:
    """The model's speedup of each drafting method beside the measured one, both against plain after the prompt, and
    both the geometric mean over answers.
    """
    measured = speedups(trace, PLAIN, decode_only=True)
    predictions = []
    for name in trace.drafting:
        own = trace.select(name)
        steps = own.steps
        later = steps.index > 0
        if name not in measured or not later.any():
            continue
        labels = steps.label[later]
        values = (steps.num_emitted, steps.num_drafted + 1, tree_shapes(own).levels, steps.num_rows)
        means = np.array([_means(labels, value[later]) for value in values])  # (4, answers)
        ratios = [model.speedup(tau, columns, levels, round(rows)) for tau, columns, levels, rows in means.T]
        tau, columns, levels = (float(value[later].mean()) for value in values[:3])
        predictions.append(Prediction(name, tau, columns, levels, geometric_mean(ratios).value, measured[name]))
    return predictions


def _means(labels: Ints, values: Ints) -> Floats:
    """Mean of ``values`` for each label that occurs."""
    counts = np.bincount(labels)
    sums = np.bincount(labels, values)
    return np.asarray(sums[counts > 0] / counts[counts > 0])


def _first_tokens(trace: Trace) -> dict[tuple[str, int, str, int], int]:
    """Tokens of the first pass of each answer; one where a method of transformers does not tell."""
    first = {(o.label.name, o.label.run, o.label.question_id, o.label.turn): 1 for o in trace.outputs}
    steps = trace.steps
    for i in np.flatnonzero(steps.index == 0):
        label = trace.labels[steps.label[i]]
        first[label.name, label.run, label.question_id, label.turn] = int(steps.num_emitted[i])
    return first
