"""Trees: one as it was proposed and accepted, the mask it was scored under, two tree methods, and all methods."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D

from specdec.analysis import acceptance
from specdec.analysis.columns import BASELINE, Bools, Trace
from specdec.analysis.figures.picked import Picked, branching_method, pick_step
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
from specdec.analysis.results import Bench, row_name
from specdec.analysis.speedup import speedups


@in_theme
def tree_structure_visualization(trace: Trace, ax: Axes | None = None, method: str | None = None) -> Axes:
    """A real tree with its accepted path, against the chain of the drafter's first choices."""
    step = pick_step(trace, method or branching_method(trace), max_nodes=17, prefer_branches=True)
    ax, colors = new_axes(ax), theme()
    ax.set_axis_off()
    depths, heights = step.depths, _heights(step)
    kept, chain = set(step.nodes), set(step.first_choice)
    for node, parent in enumerate(step.tree_parents):
        if parent >= 0:
            is_kept = node in kept
            ax.plot(
                [depths[parent], depths[node]], [heights[parent], heights[node]], zorder=1,
                color=colors.accepted if is_kept else colors.faint, lw=4 if is_kept else 1.6,
                ls="-" if node in chain else (0, (3, 2)),
            )  # fmt: skip
    for node in range(len(step.tree_tokens)):
        color = colors.ink if node == 0 else colors.accepted if node in kept else colors.rejected
        label = shown(step.text(node))
        if step.node_probs and node:
            label += f"  {step.node_probs[node]:.2g}"
        ax.text(
            depths[node], heights[node], label, ha="center", va="center", fontsize=11, parse_math=False, zorder=2,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": colors.ground, "edgecolor": color, "lw": 1.8},
        )  # fmt: skip
    by_chain = sum(node in kept for node in step.first_choice) - 1
    by_tree = len(step.nodes) - 1
    ax.margins(x=0.12, y=0.08)
    ax.set_title(
        f"A tree of {step.name}: {by_tree} draft{'s' * (by_tree != 1)} accepted, "
        f"{by_chain or 'none'} by its first choices alone"
    )
    handles = [
        Line2D([], [], color=colors.accepted, lw=4, label="accepted path"),
        Line2D([], [], color=colors.faint, lw=1.6, label="first choice (a chain)"),
        Line2D([], [], color=colors.faint, lw=1.6, ls=(0, (3, 2)), label="other choices"),
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, fontsize=11)
    numbers = "numbers: the target's probability at temperature 1, " if step.node_probs else ""
    own = f"the target went on with {shown(step.token_text(len(step.tokens) - 1))}"
    caption(
        ax,
        f"{numbers}{own}, {_where(step)}; the step where branches brought most",
        conditions(step.run.provenance),
    )
    return ax


@in_theme
def tree_attention_mask(trace: Trace, ax: Axes | None = None, method: str | None = None) -> Axes:
    """Who sees whom in one real step: every node sees the text before, itself and its ancestors."""
    step = pick_step(trace, method or branching_method(trace), max_nodes=15, prefer_branches=True)
    ax, colors = new_axes(ax), theme()
    n = len(step.tree_parents)
    mask = np.concatenate([np.ones((n, 1), np.bool_), _ancestors(step.tree_parents)], axis=1)
    kept = np.isin(np.arange(n), step.nodes)
    shade = np.where(mask, np.where(kept[:, None], 2, 1), 0)
    ax.pcolormesh(shade, cmap=ListedColormap([colors.ground, colors.own, colors.accepted]), vmin=0, vmax=2,
                  edgecolors=colors.faint, lw=0.8)  # fmt: skip
    labels = [shown(step.text(node), 9) for node in range(n)]
    ax.set_xticks(np.arange(n + 1) + 0.5, [f"{step.position - 1} earlier", *labels], rotation=50, ha="left")
    ax.xaxis.tick_top()
    ax.set_yticks(np.arange(n) + 0.5, labels)
    for tick in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        tick.set_parse_math(False)
    ax.tick_params(length=0, labelsize=10.5)
    ax.invert_yaxis()
    ax.set(ylabel="node")
    ax.set_title(f"The mask of one pass of {step.name}: what each of {n} nodes may attend to")
    swatches = [(colors.accepted, "accepted path"), (colors.own, "other nodes"), (colors.ground, "not seen")]
    handles = [
        Line2D([], [], ls="", marker="s", ms=11, color=color, markeredgecolor=colors.faint, label=label)
        for color, label in swatches
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    caption(ax, _where(step), conditions(step.run.provenance))
    return ax


@in_theme
def specinfer_vs_medusa(trace: Trace, ax: Axes | None = None) -> Axes:
    """Trees of a draft model (SpecInfer's) against trees of extra heads (Medusa's), on the same prompts."""
    drafting = trace.drafting
    name_of = {label.method: label.name for label in trace.labels if label.name in drafting}
    missing = [method for method in ("model", "medusa") if method not in name_of]
    if missing:
        raise MissingDataError(
            f"a trace that holds the drafters model and medusa on the same prompts; {' and '.join(missing)} is missing"
        )
    ax, colors = new_axes(ax), theme()
    measured = speedups(trace)
    names = trace.names
    for place, name in enumerate((name_of["model"], name_of["medusa"])):
        length = acceptance.mean_acceptance_length(trace.select(name))
        for row, estimate in ((place, length), (3 + place, measured[name])):
            _bar(ax, row, estimate, color_of(name, names))
    labels = [f"{name_of['model']} (SpecInfer)", f"{name_of['medusa']} (Medusa)"]
    ax.set_yticks([0, 1, 3, 4], labels * 2)
    ax.invert_yaxis()
    ax.axvline(1, color=colors.ink, lw=1, ls=(0, (2, 2)))
    ax.text(0, -0.75, "tokens a pass", weight="bold", va="center")
    ax.text(0, 2.25, "speed, generate() = 1", weight="bold", va="center")
    ax.set_ylim(4.7, -1.2)
    ax.set_title("SpecInfer's trees and Medusa's")
    caption(ax, "bars: 95 % intervals over prompts", conditions(trace.runs[0].provenance))
    return ax


@in_theme
def speedup_comparison(source: Bench | Trace, ax: Axes | None = None) -> Axes:
    """Every method of a bench against transformers' generate(), with intervals; lossy ones are marked."""
    ax, colors = new_axes(ax), theme()
    rows = _bench_rows(source) if isinstance(source, Bench) else _trace_rows(source)
    names = [name for name, _, _ in rows]
    for place, (name, estimate, is_lossless) in enumerate(rows):
        color = color_of(name, names)
        error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
        ax.errorbar(estimate.value, place, xerr=error, color=color, fmt=marker_of(name, names), ms=11, lw=2.4, capsize=5,
                    mfc=color if is_lossless else colors.ground, mew=2)  # fmt: skip
        ax.text(estimate.high, place - 0.28, f" {estimate.value:.2f}x", fontsize=12, color=colors.ink, va="center")
    ax.axvline(1, color=colors.ink, lw=1, ls=(0, (2, 2)))
    ax.set_yticks(range(len(rows)), [name if ok else f"{name}\n(lossy: other text)" for name, _, ok in rows])
    ax.set(
        ylim=(len(rows) - 0.5, -0.6),
        xlim=(0, 1.1 * max(each.high for _, each, _ in rows)),
        xlabel="speed, transformers' generate() = 1",
    )
    ax.grid(axis="x")
    ax.set_axisbelow(True)
    ax.set_title("Speed of every method, with 95 % intervals over prompts")
    provenance = source.provenance if isinstance(source, Bench) else source.runs[0].provenance
    caption(ax, conditions(provenance))
    return ax


def _bench_rows(bench: Bench) -> list[tuple[str, Estimate, bool]]:
    return [
        (
            row_name(row),
            Estimate(row["speedup"], row["speedup_low"], row["speedup_high"], row.get("num_prompts", 0)),
            bool(row["lossless"]),
        )
        for row in bench.rows
    ]


def _trace_rows(trace: Trace) -> list[tuple[str, Estimate, bool]]:
    if BASELINE not in trace.names:
        raise MissingDataError("a trace of specdec bench, which holds transformers' generate()")
    lossy = {output.label.name for output in trace.outputs if output.lossless is False}
    return [(name, estimate, name not in lossy) for name, estimate in speedups(trace).items()]


def _bar(ax: Axes, place: float, estimate: Estimate, color: str) -> None:
    error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
    ax.barh(place, estimate.value, 0.7, color=color, xerr=error, ecolor=theme().ink, capsize=4)
    ax.text(estimate.high, place, f"  {estimate.value:.2f}", va="center")


def _heights(step: Picked) -> list[float]:
    """Leaves from top to bottom in drawing order; a parent stands at its first child, so that first choices are
    straight lines.
    """
    heights = [0.0] * len(step.tree_parents)
    next_leaf = 0.0

    def place(node: int) -> None:
        nonlocal next_leaf
        below = step.children(node)
        for child in below:
            place(child)
        if below:
            heights[node] = heights[below[0]]
        else:
            heights[node] = -next_leaf
            next_leaf += 1

    place(0)
    return heights


def _ancestors(parents: list[int]) -> Bools:
    """(n, n): whether node j is i or above it."""
    seen = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def _where(step: Picked) -> str:
    return f"question {step.label.question_id} ({step.label.category}), position {step.position}"
