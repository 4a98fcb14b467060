"""Engines that serve many requests: what they keep in memory, how fast they are, and how that grows with the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

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
from specdec.analysis.results import Workload

Row = Mapping[str, Any]
_MOST_ROWS = 16


def paged_row(workload: Workload, *, sharing: bool | None = None) -> Row:
    """The row of our engine with the most requests at a time; ``sharing``: one where rows shared blocks, or did not.

    Raises:
        MissingDataError: there is none.
    """
    found = [row for row in workload.paged if sharing is None or bool(row["prefix_hit_rate"]) is sharing]
    if not found:
        raise MissingDataError(
            "a file of specdec bench --workload with the engine paged" + (" and a shared prefix" if sharing else "")
        )
    return max(found, key=lambda row: int(row["max_rows"]))


def engine_label(row: Row) -> str:
    """The engine, and what drafts for it."""
    return str(row["engine"]) + (f" + {row['drafter']}" if row["drafter"] not in (None, "none") else "")


def about(workload: Workload, row: Row | None = None) -> str:
    """The workload in words, for captions."""
    parts = [f"workload {workload.name}"]
    if row is not None:
        parts.append(f"{engine_label(row)}, at most {row['max_rows']} rows, blocks of {row['kv']['block_size']} tokens")
    return "; ".join(parts)


@in_theme
def kv_cache_problem(workload: Workload, ax: Axes | None = None) -> Axes:
    """What rows of one real pass would leave unused if each had one piece of memory, as long as the longest may get."""
    row = paged_row(workload)
    kv, snapshot = row["kv"], row["kv"]["snapshot"]
    everyone = sorted(snapshot["rows"], key=lambda each: -int(each["num_kept"]))
    rows = everyone[:: -(-len(everyone) // _MOST_ROWS)]  # percentages count those that are not drawn, too
    if len(rows) < 2:
        raise MissingDataError("a workload of which at least two requests ran at a time")
    ax, colors = new_axes(ax), theme()
    kept = np.array([each["num_kept"] for each in rows])
    longest, most = int(kept.max()), int(kv["longest"])
    places = np.arange(len(rows))
    ax.barh(places, most - longest, 0.72, longest, color=colors.ground, edgecolor=colors.faint, lw=1)
    ax.barh(places, longest - kept, 0.72, kept, color=colors.ground, edgecolor=colors.rejected, hatch="///", lw=1)
    ax.barh(places, kept, 0.72, color=colors.own)
    ax.set_yticks(places, [each["request_id"] for each in rows], fontsize=10.5)
    ax.set(xlabel="slots for keys and values, one a token", xlim=(0, most * 1.01), ylim=(len(rows) - 0.4, -0.6))
    tokens = np.array([each["num_kept"] for each in everyone])
    total = len(tokens) * most
    ax.set_title(f"One piece of memory for each row: {tokens.sum() / total:.0%} of it would hold a token")
    handles = [
        Patch(color=colors.own, label=f"tokens, {tokens.sum() / total:.0%}"),
        Patch(fc=colors.ground, ec=colors.rejected, hatch="///",
              label=f"padding to the longest row, {(longest - tokens).sum() / total:.0%}"),
        Patch(fc=colors.ground, ec=colors.faint,
              label=f"kept free for the longest request, {(most - longest) / most:.0%}"),
    ]  # fmt: skip
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=3, fontsize=11)
    caption(ax, f"{about(workload, row)}; pass {snapshot['index'] + 1}", conditions(workload.provenance))
    return ax


@in_theme
def memory_comparison(workload: Workload, ax: Axes | None = None) -> Axes:
    """Share of the slots that hold a token, pass by pass: in blocks, padded, and reserved for the longest request."""
    row = paged_row(workload)
    kv, passes = row["kv"], row["kv"]["passes"]
    if len(passes["time_s"]) < 2:
        raise MissingDataError("a workload of at least two passes")
    ax, colors = new_axes(ax), theme()
    layouts = [
        ("filled", "slots", "utilisation", f"blocks of {kv['block_size']}", colors.own, "-"),
        ("tokens", "padded", "utilisation_padded", "padded to the longest row", colors.rejected, (0, (4, 2))),
        ("tokens", "reserved", "utilisation_reserved", "room for the longest request", colors.cycle[3], (0, (1, 1))),
    ]
    number = np.arange(1, len(passes["time_s"]) + 1)
    for used, had, mean, name, color, style in layouts:
        share = np.array(passes[used]) / np.maximum(np.array(passes[had]), 1)
        ax.plot(number, 100 * share, color=color, ls=style, lw=2, label=f"{name}: {kv[mean]:.1%}")
    ax.set(xlabel="pass", ylabel="slots that hold a token, %", ylim=(0, 104), xlim=(1, number[-1]))
    ax.grid(axis="y")
    ax.set_title("How much of the key-value cache is in use")
    ax.legend(loc="upper center", bbox_to_anchor=(0.48, -0.13), ncols=3, fontsize=11)
    caption(
        ax, f"{about(workload, row)}; percentages: means over passes; padded and reserved: computed for the same rows",
        conditions(workload.provenance),
    )  # fmt: skip
    return ax


@in_theme
def performance_comparison(workload: Workload, ax: Axes | None = None) -> Axes:
    """Every engine on the same requests: tokens a second, and how long readers wait."""
    most = max(int(row["max_rows"]) for row in workload.rows)
    rows = [row for row in workload.rows if row["max_rows"] == most]
    if len(rows) < 2:
        raise MissingDataError("a workload that at least two engines served with the same --max-rows")
    ax = new_axes(ax)
    names = [engine_label(row) for row in rows]
    rates = [float(row["tokens_per_s"]) for row in rows]
    top = max(rates)
    for place, (name, row, rate) in enumerate(zip(names, rows, rates, strict=True)):
        wrong = row["match"]["unexplained"]
        ax.barh(place, rate, 0.6, color=color_of(name, names), hatch="xx" if wrong else None)
        ax.text(rate, place, f" {rate:.1f}", va="center", fontsize=12)
        gaps = row["inter_token_s"]
        cells = (
            f"{row['first_token_s']['p50']:.2f} / {row['first_token_s']['p99']:.2f}",
            "-" if gaps is None else f"{1000 * gaps['p50']:.0f} / {1000 * gaps['p99']:.0f}",
            _match(row),
        )
        for x, cell in zip((1.33, 1.7, 2.03), cells, strict=True):
            ax.text(x * top, place, cell, ha="center", va="center", fontsize=11.5)
    heads = ("first token\ns, p50 / p99", "between tokens\nms, p50 / p99", "same text as\neach alone")
    for x, head in zip((1.33, 1.7, 2.03), heads, strict=True):
        ax.text(x * top, -0.85, head, ha="center", va="center", fontsize=10.5, weight="bold")
    ax.set_yticks(range(len(rows)), names)
    ax.set(ylim=(len(rows) - 0.5, -1.35), xlim=(0, 2.18 * top), xlabel="")
    ticks = [tick for tick in ax.get_xticks() if tick <= top * 1.001]
    ax.set_xticks(ticks)
    ax.text(0, -0.85, "tokens a second", va="center", fontsize=10.5, weight="bold")
    ax.spines["bottom"].set_bounds(0, top)
    ax.set_title(f"{workload.num_requests} requests, {most} at a time")
    caption(ax, about(workload), conditions(workload.provenance))
    return ax


@in_theme
def throughput_comparison(workload: Workload, ax: Axes | None = None) -> Axes:
    """Tokens a second against the requests that run at a time, for every engine."""
    by_name: dict[str, list[Row]] = {}
    for row in workload.rows:
        by_name.setdefault(engine_label(row), []).append(row)
    if len({row["max_rows"] for row in workload.rows}) < 2:
        raise MissingDataError("a workload measured with at least two values of --max-rows")
    ax, colors = new_axes(ax), theme()
    names = list(by_name)
    for name, rows in by_name.items():
        rows = sorted(rows, key=lambda row: int(row["max_rows"]))
        each = [row.get("tokens_per_s_each") or [row["tokens_per_s"]] for row in rows]
        sizes, color = [row["max_rows"] for row in rows], color_of(name, names)
        ax.plot(sizes, [row["tokens_per_s"] for row in rows], color=color, marker=marker_of(name, names), ms=9, lw=2,
                ls="--" if name.startswith("hf") else "-", label=f"{name}{_hits(rows)}")  # fmt: skip
        ax.vlines(sizes, [min(rates) for rates in each], [max(rates) for rates in each], color=color, lw=2, alpha=0.6)
    ticks = sorted({int(row["max_rows"]) for row in workload.rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel="requests at a time", ylabel="tokens a second", ylim=(0, None))
    ax.grid(axis="y")
    ax.set_title(f"Throughput over {workload.num_requests} requests")
    ax.legend(handles=_handles(ax), loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=colors.ink)
    caption(
        ax, f"{about(workload)}; bars: the slowest and the fastest repeat", conditions(workload.provenance)
    )  # fmt: skip
    return ax


def _handles(ax: Axes) -> Sequence[Line2D]:
    """The lines, fastest at their right end first."""
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    return sorted(lines, key=lambda line: -float(np.asarray(line.get_ydata())[-1]))


def _hits(rows: Sequence[Row]) -> str:
    rates = [row["prefix_hit_rate"] for row in rows if row["prefix_hit_rate"]]
    return f"\n({max(rates):.0%} of prompt tokens known)" if rates else ""


def _match(row: Row) -> str:
    match = row["match"]
    return "sampled" if match["compared_with"] is None else f"{match['identical']}/{match['total']}"
