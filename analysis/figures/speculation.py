"""Speculation itself: two timelines of one prompt, one step with its probabilities, and rates against theory."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch

from specdec.analysis import acceptance
from specdec.analysis.columns import PLAIN, Floats, Ints, Steps, Trace
from specdec.analysis.figures.picked import best_method, pick_step
from specdec.analysis.figures.style import (
    MissingDataError,
    caption,
    color_of,
    conditions,
    in_theme,
    marker_of,
    new_axes,
    shown,
    theme,
)
from specdec.analysis.intervals import Estimate

MAX_SIBLINGS = 3  # that fit below each other and can still be read


@in_theme
def standard_vs_speculative(trace: Trace, ax: Axes | None = None, method: str | None = None) -> Axes:
    """Plain decoding and one method on the same prompt, pass by pass: the prompt whose gain is nearest the median."""
    method = method or best_method(trace)
    if PLAIN not in trace.names:
        raise MissingDataError("a trace of specdec bench, which holds plain decoding")
    ax, colors = new_axes(ax), theme()
    label = _typical_answer(trace, method)
    lanes = [(PLAIN, 1.0), (method, 0.0)]
    ends = {}
    for name, height in lanes:
        steps = _answer(trace, name, label)
        parts = [steps.draft_s, steps.score_s, steps.verify_s]
        ends[name] = _lane(ax, height, parts, np.asarray(steps.num_emitted), steps.num_rows)
    longest = max(end for end, _ in ends.values())
    for name, height in lanes:
        end, tokens = ends[name]
        ax.text(end + longest * 0.01, height, f"{tokens} tokens\n{end:.2f} s", va="center", fontsize=12)
    ax.set(xlim=(0, longest * 1.13), ylim=(-0.65, 1.65), xlabel="seconds since the prompt was handed over")
    ax.set_yticks([height for _, height in lanes], [name for name, _ in lanes])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_title(f"The same prompt, pass by pass: plain decoding and {method}")
    handles = [
        Patch(color=colors.faint, label="prompt"),
        Patch(color=colors.own, label="the target's pass (number: tokens it brought)"),
        Patch(color=colors.rejected, label="drafting"),
    ]
    ax.legend(handles=handles, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.02))
    run = trace.runs[label[0]]
    caption(ax, f"question {label[1]} ({label[2]})", conditions(run.provenance))
    return ax


@in_theme
def speculative_algorithm_flow(trace: Trace, ax: Axes | None = None, method: str | None = None) -> Axes:
    """One real step: what was drafted, how probable the target found it, and what was emitted."""
    if trace.steps.node_probs is None:
        raise MissingDataError("probabilities of steps: specdec bench --trace FILE --trace-probs")
    step = pick_step(trace, method or best_method(trace), max_nodes=12, max_accepted=4, prefer_branches=True)
    ax, colors = new_axes(ax), theme()
    ax.set_axis_off()
    depth = len(step.nodes)
    rows = min(max(len(step.children(node)) for node in step.nodes), MAX_SIBLINGS)
    columns = depth + 1
    ax.set(xlim=(-0.75, max(columns, 5) - 0.45), ylim=(-1.75, rows + 0.8))
    _box(ax, -0.4, rows, shown(step.text(0)), "newest\ntoken", colors.faint, width=0.66)
    for i, node in enumerate(step.nodes):
        kept = step.nodes[i + 1] if i + 1 < depth else None
        below = step.children(node)
        listed = [child for child in below if child == kept or child in below[:MAX_SIBLINGS]]
        # The kept child is shown however late it came.
        listed = listed[: MAX_SIBLINGS - 1] + listed[-1:] if len(listed) > MAX_SIBLINGS else listed
        for place, child in enumerate(listed):
            is_kept = child == kept
            color = colors.accepted if is_kept else colors.rejected
            sign = "✓ accepted" if is_kept else "✗ rejected"
            _box(ax, i + 0.5, rows - place, shown(step.text(child)), f"p = {step.node_probs[child]:.2g}\n{sign}", color)
        if len(listed) < len(below):
            more = f"and {len(below) - len(listed)} more, rejected"
            ax.text(i + 0.5, rows - len(listed) + 0.52, more, ha="center", va="center", fontsize=10)
        x = i + 0.5
        is_own = i + 1 == depth
        color = colors.own if is_own else colors.accepted
        _box(ax, x, -1.2, shown(step.token_text(i)), f"p = {step.token_probs[i]:.2g}", color, is_filled=True)
        ax.annotate("", (x, -0.75), (x, 0.4), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.6})
        if is_own:
            ax.text(x + 0.06, -0.15, "the target's\nown choice", fontsize=10.5, color=color, va="center")
    ax.text(-0.72, rows + 0.62, "1  drafted, then scored in one pass", fontsize=12.5, weight="bold", va="center")
    ax.text(-0.72, -0.45, "2  emitted", fontsize=12.5, weight="bold", va="center")
    passes = f"{len(step.nodes)} token{'s' * (len(step.nodes) > 1)} from one pass of the target"
    ax.set_title(f"One step of {step.name}: {passes}")
    caption(
        ax,
        f"p: the target's probability at temperature 1, question {step.label.question_id} ({step.label.category}), "
        f"position {step.position}",
        conditions(step.run.provenance),
    )
    return ax


@in_theme
def acceptance_rate_analysis(trace: Trace, ax: Axes | None = None) -> Axes:
    """How far drafts get: measured (Kaplan-Meier, since drafts end at different depths), against one constant rate."""
    ax = new_axes(ax)
    names = trace.names
    drafting = trace.drafting
    if not drafting:
        raise MissingDataError("a trace of a method that drafted something")
    longest = 0
    for name in drafting:
        rates = [rate for rate in acceptance.by_depth(trace.select(name)) if rate.num_proposed >= 5]
        if not rates:
            continue
        survival, low, high = _survival([rate.rate for rate in rates])
        tried, met = (sum(getattr(rate, what) for rate in rates) for what in ("num_proposed", "num_met"))
        depth = np.arange(1, len(rates) + 1)
        longest = max(longest, len(rates))
        color = color_of(name, names)
        ax.plot(depth, survival, color=color, marker=marker_of(name, names), lw=2, ms=7, label=f"{name}, measured")
        ax.fill_between(depth, low, high, color=color, alpha=0.13, lw=0)
        theory = (met / tried) ** depth
        ax.plot(depth, theory, color=color, ls=(0, (2, 2)), lw=1.4, label=f"{met / tried:.2f} at every depth")
    ax.set(xlabel="drafted tokens in a row", ylabel="chance that all are accepted", ylim=(0, 1))
    ax.set_xticks(range(1, longest + 1))
    ax.grid(axis="y")
    ax.set_title("How far drafts get, and what one constant rate would give")
    ax.legend(ncols=1)
    caption(ax, "bands: product of 95 % intervals over prompts", conditions(trace.runs[0].provenance))
    return ax


def _survival(rates: list[Estimate]) -> tuple[Floats, Floats, Floats]:
    """Products of the conditional rates, and of their bounds."""
    value, low, high = (np.cumprod([getattr(rate, what) for rate in rates]) for what in ("value", "low", "high"))
    return value, low, high


def _typical_answer(trace: Trace, method: str) -> tuple[int, str, str, int]:
    """Run, question, category and turn of the answer whose ratio of seconds is the median."""
    seconds: dict[str, dict[tuple[int, str, str, int], float]] = {PLAIN: {}, method: {}}
    for output in trace.outputs:
        label = output.label
        if label.name in seconds:
            seconds[label.name][label.run, label.question_id, label.category, label.turn] = output.wall_s
    shared = [key for key in seconds[PLAIN] if key in seconds[method]]
    if not shared:
        raise MissingDataError(f"a trace that holds plain and {method} on the same prompt")
    ratios = sorted((seconds[PLAIN][key] / seconds[method][key], key) for key in shared)
    return ratios[len(ratios) // 2][1]


def _answer(trace: Trace, name: str, label: tuple[int, str, str, int]) -> Steps:
    good = [
        other.name == name and (other.run, other.question_id, other.category, other.turn) == label
        for other in trace.labels
    ]
    return trace.steps.take(np.array(good)[trace.steps.label])


def _lane(ax: Axes, height: float, parts: list[Floats], emitted: Ints, num_rows: Ints) -> tuple[float, int]:
    """One method's passes side by side; where they end and how many tokens they brought."""
    colors = theme()
    draft, score, verify = (part * num_rows for part in parts)
    ends = np.cumsum(draft + score + verify)
    starts = ends - (draft + score + verify)
    ax.barh(height, draft, 0.62, starts, color=colors.rejected, lw=0)
    fill = [colors.faint] + [colors.own] * (len(score) - 1)
    ax.barh(height, score + verify, 0.62, starts + draft, color=fill, edgecolor=colors.ground, lw=0.8)
    for i in range(len(ends)):
        is_wide = score[i] > ends[-1] / 90
        if emitted[i] > 1 or (i and len(ends) < 30 and is_wide):
            x = starts[i] + draft[i] + score[i] / 2
            ink = colors.ink if i == 0 else colors.ground
            ax.text(x, height, str(emitted[i]), ha="center", va="center", color=ink, fontsize=10.5, weight="bold")
    return float(ends[-1]), int(emitted.sum())


def _box(
    ax: Axes, x: float, y: float, text: str, below: str, color: str, *, width: float = 0.86, is_filled: bool = False
) -> None:
    colors = theme()
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.36), width, 0.72, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=color if is_filled else colors.ground, edgecolor=color, lw=2.2,
        )
    )  # fmt: skip
    ink = colors.ground if is_filled else colors.ink
    ax.text(x, y + 0.16, text, ha="center", va="center", fontsize=13, weight="bold", color=ink, parse_math=False)
    ax.text(x, y - 0.14, below, ha="center", va="center", fontsize=9.5, color=ink)
