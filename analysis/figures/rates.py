"""Bars of conditional acceptance rates, by whatever attempts were grouped by."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from specdec.analysis import acceptance
from specdec.analysis.acceptance import Rate
from specdec.analysis.columns import Trace
from specdec.analysis.figures.picked import best_method
from specdec.analysis.figures.style import MissingDataError, caption, conditions, in_theme, new_axes, theme


@in_theme
def rate_bars(rates: Sequence[Rate], ax: Axes | None = None, *, title: str = "", xlabel: str = "") -> Axes:
    """One bar for each group, with its interval over prompts and the number of attempts."""
    if not rates:
        raise MissingDataError("attempts of this kind: none were recorded")
    ax, colors = new_axes(ax), theme()
    for place, entry in enumerate(rates):
        rate = entry.rate
        error = [[max(rate.value - rate.low, 0.0)], [max(rate.high - rate.value, 0.0)]]
        ax.bar(place, rate.value, 0.7, color=colors.accepted, yerr=error, ecolor=colors.ink, capsize=4)
    ax.set_xticks(range(len(rates)), [f"{entry.key}\nn = {entry.num_proposed}" for entry in rates])
    ax.tick_params(axis="x", labelsize=10 if len(rates) > 6 else 12)
    ax.set(ylim=(0, 1.02), ylabel="share of drafts that were met", xlabel=xlabel)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    ax.set_title(title)
    return ax


@in_theme
def acceptance_by_entropy(trace: Trace, ax: Axes | None = None, method: str | None = None) -> Axes:
    """How the rate falls where the target itself is unsure."""
    method = method or best_method(trace)
    rates = acceptance.by_entropy(trace.select(method))
    if not rates:
        raise MissingDataError("entropies of steps: specdec bench --trace FILE --trace-probs")
    ax = rate_bars(
        rates,
        ax,
        title=f"{method}: acceptance by how unsure the target is",
        xlabel="entropy of the target's next-token distribution, nats",
    )
    caption(ax, "95 % intervals over prompts", conditions(trace.runs[0].provenance))
    return ax
