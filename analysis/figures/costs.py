"""What passes cost, where drafts are accepted, what it brings on each kind of text, and what the tuner saw."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from specdec.analysis import acceptance, speedup
from specdec.analysis.columns import BASELINE, PLAIN, Trace
from specdec.analysis.figures.picked import best_method, branching_method
from specdec.analysis.figures.style import (
    MissingDataError,
    caption,
    color_of,
    conditions,
    in_theme,
    marker_of,
    new_axes,
    theme,
)
from specdec.analysis.results import Tune


@in_theme
def cost_curve(trace: Trace, ax: Axes | None = None) -> Axes:
    """v(n): what a pass with n columns takes, as met on the way, with the cost model's line."""
    points = speedup.cost_curve(trace)
    if len(points) < 2:
        raise MissingDataError("a trace with passes of at least two sizes, three of each")
    ax, colors = new_axes(ax), theme()
    columns = np.array([point.columns for point in points])
    median, low, high = (
        1000 * np.array([getattr(p, what) for p in points]) for what in ("median_s", "low_s", "high_s")
    )
    sizes = 30 + 12 * np.sqrt([point.num_passes for point in points])
    ax.vlines(columns, low, high, color=colors.own, lw=2, alpha=0.6)
    ax.scatter(columns, median, sizes, color=colors.own, zorder=3, label="median and quartiles; area: number of passes")
    model = speedup.fit(trace)
    line = np.array([1, columns.max()])
    ax.plot(line, 1000 * (model.fixed_s + model.column_s * line), color=colors.rejected, ls=(0, (4, 2)), lw=2,
            label=f"{1000 * model.fixed_s:.1f} ms + {1000 * model.column_s:.2f} ms a column")  # fmt: skip
    ax.set(xlabel="columns of the pass (rows x nodes)", ylabel="milliseconds", ylim=(0, None), xlim=(0, None))
    ax.grid(axis="y")
    ax.set_title("What a pass of the target costs, by its size")
    ax.legend(loc="upper left")
    caption(ax, "passes after the first of each answer", conditions(trace.runs[0].provenance))
    return ax


@in_theme
def acceptance_by_depth_and_rank(trace: Trace, ax: Axes | None = None, method: str | None = None) -> Axes:
    """Heat map: how often the child of a rank is the accepted one, at each depth."""
    method = method or branching_method(trace)
    table, visits = acceptance.by_rank(trace.select(method))
    depths = int((visits >= 5).sum())
    if not depths:
        raise MissingDataError(f"a trace with at least five drafts of {method}")
    table = table[:depths, :8]
    ax, colors = new_axes(ax), theme()
    ax.pcolormesh(table, cmap=colors.ramp, vmin=0, vmax=1, edgecolors=colors.faint, lw=1)
    for (depth, rank), share in np.ndenumerate(table):
        ink = colors.ground if share > 0.55 else colors.ink
        ax.text(rank + 0.5, depth + 0.5, f"{share:.2f}", ha="center", va="center", color=ink)
    ax.set_xticks(np.arange(table.shape[1]) + 0.5, [str(rank + 1) for rank in range(table.shape[1])])
    ax.set_yticks(np.arange(depths) + 0.5, [f"{depth + 1}   (n = {visits[depth]})" for depth in range(depths)])
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.set(xlabel="choice of the drafter", ylabel="depth (nodes that were reached)")
    ax.set_title(f"{method}: which of its choices is the accepted one")
    caption(ax, "share of reached nodes with children; where five or more were", conditions(trace.runs[0].provenance))
    return ax


@in_theme
def speedup_by_category(trace: Trace, ax: Axes | None = None, method: str | None = None) -> Axes:
    """Per-category bars of one method, with intervals where there is more than one prompt."""
    method = method or best_method(trace)
    if BASELINE not in trace.names:
        raise MissingDataError("a trace of specdec bench, which holds transformers' generate()")
    ax, colors = new_axes(ax), theme()
    shares = {name: trace.select([BASELINE, PLAIN, method], [name]) for name in trace.categories}
    estimates = {name: speedup.speedups(part) for name, part in shares.items()}
    order = sorted(estimates, key=lambda name: estimates[name][method].value)
    for place, name in enumerate(order):
        estimate = estimates[name][method]
        hurts = estimate.value < estimates[name][PLAIN].value
        error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
        ax.barh(place, estimate.value, 0.68, color=colors.rejected if hurts else colors.accepted, xerr=error,
                ecolor=colors.ink, capsize=4, hatch="//" if hurts else None, edgecolor=colors.ground, lw=0)  # fmt: skip
        plain = estimates[name][PLAIN].value
        ax.plot([plain, plain], [place - 0.42, place + 0.42], color=colors.ink, lw=3)
        ax.text(max(estimate.high, plain), place, f"  {estimate.value:.2f}x", va="center")
    counts = [len({o.label.question_id for o in shares[name].outputs}) for name in order]
    ax.set_yticks(range(len(order)), [f"{name}  (n = {count})" for name, count in zip(order, counts, strict=True)])
    ax.axvline(1, color=colors.ink, lw=1, ls=(0, (2, 2)))
    ax.margins(x=0.1)
    ax.set(xlabel="speed, transformers' generate() = 1; thick mark: our loop without drafts")
    ax.set_title(f"{method} on each kind of text")
    caption(
        ax, "hatched: slower than without drafts; 95 % intervals over prompts", conditions(trace.runs[0].provenance)
    )
    return ax


@in_theme
def step_time_breakdown(trace: Trace, ax: Axes | None = None) -> Axes:
    """Milliseconds for each emitted token: drafting, the target's pass, deciding, and what lies between steps."""
    ax, colors = new_axes(ax), theme()
    summaries = acceptance.summarise(trace)
    if not summaries:
        raise MissingDataError("a trace with steps")
    walls = {
        name: sum(rate.seconds for rate in groups.values()) for name, groups in speedup.rates(trace).items()
    }  # of all rows together, as the steps' shares are
    kinds = [
        ("the target's pass", colors.own, None), ("drafting", colors.rejected, "//"),
        ("deciding and keeping", colors.accepted, "\\\\"), ("between steps", colors.faint, ".."),
    ]  # fmt: skip
    for place, summary in enumerate(summaries):
        parts = (summary.score_s, summary.draft_s, summary.verify_s)
        rest = max(walls.get(summary.name, sum(parts)) - sum(parts), 0.0)
        left = 0.0
        for seconds, (label, color, hatch) in zip((*parts, rest), kinds, strict=True):
            width = 1000 * seconds / summary.num_tokens
            ax.barh(place, width, 0.62, left, color=color, hatch=hatch, edgecolor=colors.ground, lw=0,
                    label=label if place == 0 else None)  # fmt: skip
            left += width
        share = 100 * (sum(parts) + rest - summary.score_s) / (sum(parts) + rest)
        ax.text(left, place, f"  {left:.1f} ms, {share:.1f} % not the target", va="center")
    ax.set_yticks(range(len(summaries)), [summary.name for summary in summaries])
    ax.set(ylim=(len(summaries) - 0.4, -0.6), xlabel="milliseconds for each emitted token, prompts included")
    ax.margins(x=0.28)
    ax.set_title("Where the time goes")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=4)
    caption(ax, conditions(trace.runs[0].provenance))
    return ax


@in_theme
def tuner_landscape(tune: Tune, ax: Axes | None = None, batch_size: int | None = None) -> Axes:
    """Every configuration that ``specdec tune`` considered: predicted by size, measured with intervals, the winner."""
    size = min(tune.entries) if batch_size is None else batch_size
    entry = tune.entries[size]
    ax, colors = new_axes(ax), theme()
    drafters = list(
        dict.fromkeys(candidate["drafter"] for candidate in entry["candidates"] if candidate["drafter"] != "none")
    )
    for drafter in drafters:
        own = [candidate for candidate in entry["candidates"] if candidate["drafter"] == drafter]
        color, marker = color_of(drafter, drafters), marker_of(drafter, drafters)
        fixed = sorted(
            (candidate["max_nodes"], candidate["predicted"]) for candidate in own if not candidate["adaptive"]
        )
        ax.plot(*np.array(fixed).reshape(-1, 2).T, color=color, marker=marker, ms=6, lw=1.6, alpha=0.75,
                label=f"{drafter}, predicted")  # fmt: skip
        for candidate in own:
            if candidate["adaptive"]:
                ax.axhline(
                    candidate["predicted"], color=color, ls=(0, (2, 2)), lw=1.4, label=f"{drafter}, adaptive budget"
                )
            if candidate["measured"] is None:
                continue
            value, low, high = candidate["measured"]
            ax.errorbar(candidate["max_nodes"] + (0.25 if candidate["adaptive"] else 0), value, [[value - low], [high - value]],
                        color=color, fmt=marker, ms=11, capsize=4, mfc=colors.ground, mew=2)  # fmt: skip
    best = entry["measured"] or [entry["predicted"]]
    ax.plot(entry["max_nodes"], best[0], marker="*", ms=22, color=colors.accepted, mec=colors.ink, ls="", zorder=5,
            label=f"taken: {entry['drafter']}, {'up to ' * entry['adaptive']}{entry['max_nodes']} nodes")  # fmt: skip
    ax.axhline(1, color=colors.ink, lw=1)
    ax.set(xlabel="nodes of the draft tree", ylabel="speed, plain decoding = 1")
    ax.grid(axis="y")
    ax.set_title(f"What the tuner considered at batch size {size}")
    ax.legend(fontsize=11)
    caption(ax, "open signs: measured, with 95 % intervals", f"{tune.target}; {conditions(tune.provenance)}")
    return ax
