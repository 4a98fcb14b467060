"""Blocks of a paged key-value cache in one real pass: where rows have theirs, who shares them, and how a pass reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from specdec.analysis.figures.serving import about, paged_row
from specdec.analysis.figures.style import MissingDataError, caption, conditions, in_theme, new_axes, theme
from specdec.analysis.results import Workload

Row = Mapping[str, Any]
_TABLES, _COLUMNS, _MAP = 5, 22, 44  # rows and blocks of each that are shown; blocks in a line of the map


@in_theme
def block_structure(workload: Workload, ax: Axes | None = None) -> Axes:
    """Block tables of a few rows, and where their blocks lie in the pool."""
    row = paged_row(workload)
    kv, snapshot = row["kv"], row["kv"]["snapshot"]
    rows = _spread(snapshot["rows"], _TABLES)
    ax, colors = new_axes(ax), theme()
    ax.set_axis_off()
    size = int(kv["block_size"])
    owners = _owners(snapshot["rows"])
    number_of = {block: i for i, block in enumerate(sorted(owners))}
    inks = {each["request_id"]: colors.cycle[i % len(colors.cycle)] for i, each in enumerate(rows)}
    for place, each in enumerate(rows):
        ax.text(-0.6, -1.7 * place + 0.5, each["request_id"], ha="right", va="center", fontsize=11)
        _table(ax, each, size, -1.7 * place, inks[each["request_id"]], number_of)
    top = -1.7 * len(rows) - 0.7
    ax.text(0, 1.95, "Block tables: blocks in the order of the text, numbered as they lie in memory",
            fontsize=12, weight="bold", va="center")  # fmt: skip
    ax.text(0, top + 0.3, "Blocks of running rows as they lie in memory; gaps: other blocks between", fontsize=12, weight="bold",
            va="center")  # fmt: skip
    bottom = _pool_map(ax, owners, inks, top - 1.4)
    ax.set(xlim=(-4.6, _MAP + 0.3), ylim=(bottom - 0.4, 2.6))
    pieces = sum(_stretches(each["blocks"]) for each in snapshot["rows"])
    ax.set_title(f"{len(snapshot['rows'])} rows in {len(owners)} blocks of {size} tokens, in {pieces} pieces of memory")
    handles = [
        Patch(fc=colors.cycle[0], alpha=0.85, label="filled (a colour for each row above)"),
        Patch(fc=colors.ground, ec=colors.cycle[0], label="room for the next tokens"),
        Patch(fc=colors.faint, label="of other rows"),
        Patch(fc=colors.ink, label="shared by rows"),
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=11)
    caption(ax, f"{about(workload, row)}; pass {snapshot['index'] + 1}", conditions(workload.provenance))
    return ax


def _table(ax: Axes, row: Row, size: int, y: float, color: str, number_of: Mapping[int, int]) -> None:
    """A row's blocks with their numbers on the map."""
    colors, width = theme(), (_MAP - 1.0) / _COLUMNS
    shown = _cut(row["blocks"], _COLUMNS)
    for place, (number, block) in enumerate(shown):
        x = place * width + (number != place)  # behind a gap where blocks are left out
        if place and number != shown[place - 1][0] + 1:
            ax.text(x - 0.45, y + 0.5, "⋯", ha="center", va="center", fontsize=12)
        filled = min(max(row["num_kept"] - number * size, 0), size) / size
        ax.add_patch(Rectangle((x + 0.1, y), (width - 0.2) * filled, 1, fc=color, ec="none", alpha=0.85))
        ax.add_patch(Rectangle((x + 0.1, y), width - 0.2, 1, fill=False, ec=color, lw=1.3))
        ink = colors.ground if filled > 0.7 else colors.ink
        ax.text(x + width / 2, y + 0.47, str(number_of[block]), ha="center", va="center", fontsize=9, color=ink)


def _pool_map(ax: Axes, owners: Mapping[int, Sequence[str]], inks: Mapping[str, str], y: float) -> float:
    """A cell for each held block, a gap where blocks between are free; where it ends."""
    colors, x = theme(), 0.0
    for before, block in pairwise([None, *sorted(owners)]):
        assert block is not None
        if before is not None and block != before + 1:
            x += 0.6
        if x > _MAP - 1:
            x, y = 0.0, y - 1.35
        names = owners[block]
        color = colors.ink if len(names) > 1 else inks.get(names[0], colors.faint)
        ax.add_patch(Rectangle((x + 0.06, y), 0.88, 1, fc=color, ec="none", alpha=1 if len(names) > 1 else 0.85))
        x += 1
    return y


@in_theme
def block_sharing(workload: Workload, ax: Axes | None = None) -> Axes:
    """Which blocks rows have in common, row by row."""
    row = paged_row(workload, sharing=True)
    kv, snapshot = row["kv"], row["kv"]["snapshot"]
    rows = snapshot["rows"][:16]
    counts = Counter(block for each in rows for block in each["blocks"])
    shared = sum(count > 1 for count in counts.values())
    if not shared:
        raise MissingDataError("a workload whose requests share a prefix, such as --workload prefix")
    ax, colors = new_axes(ax), theme()
    size, widest = int(kv["block_size"]), max(len(each["blocks"]) for each in rows)
    gap = 0.12 if widest < 50 else 0.0
    for place, each in enumerate(rows):
        for x, block in enumerate(each["blocks"]):
            is_shared = counts[block] > 1
            is_room = x * size >= each["num_kept"]
            color = colors.own if is_shared else colors.ground if is_room else colors.cycle[1]
            ax.add_patch(
                Rectangle((x + gap / 2, place - 0.36), 1 - gap, 0.72, fc=color, lw=0.7,
                          ec=colors.cycle[1] if is_room and not is_shared else colors.ground)
            )  # fmt: skip
            if widest <= 26:
                ink = colors.ink if is_room and not is_shared else colors.ground
                ax.text(x + 0.5, place, str(block), ha="center", va="center", fontsize=9, color=ink)
    ax.set_yticks(range(len(rows)), [each["request_id"] for each in rows], fontsize=10.5)
    ax.set(xlim=(0, widest), ylim=(len(rows) - 0.4, -0.6), xlabel=f"blocks of the text, {size} tokens each")
    places = sum(counts.values())
    ax.set_title(f"{places} block-table entries of {len(rows)} rows stand for {len(counts)} blocks")
    handles = [
        Patch(fc=colors.own, label=f"one of {shared} blocks that rows share"),
        Patch(fc=colors.cycle[1], label="a row's own"),
        Patch(fc=colors.ground, ec=colors.cycle[1], label="room for the next tokens"),
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.48, -0.13), ncols=3, fontsize=11)
    caption(
        ax,
        f"{about(workload, row)}; pass {snapshot['index'] + 1}; {row['prefix_hit_rate']:.0%} of all prompt tokens were "
        "found in the cache",
        conditions(workload.provenance),
    )
    return ax


@in_theme
def attention_flow(workload: Workload, ax: Axes | None = None) -> Axes:
    """How a row's pass finds its keys: from the text by the block table to places in memory."""
    row = paged_row(workload)
    kv, snapshot = row["kv"], row["kv"]["snapshot"]
    each = max(snapshot["rows"], key=_interest)
    size, count = int(kv["block_size"]), 10
    needed = each["blocks"][: -(-each["num_kept"] // size)]
    if _stretches(needed) < 2:
        raise MissingDataError("a pass in which a row's blocks lay in several pieces, as behind a shared prefix")
    ax, colors = new_axes(ax), theme()
    ax.set_axis_off()
    shown = _cut(needed, count)
    in_memory = sorted(block for _, block in shown)
    owners = _owners(snapshot["rows"])
    spot = {block: i for i, block in enumerate(in_memory)}
    step = 1.0 if len(shown) >= count else count / len(shown)
    for x, (number, block) in enumerate(shown):
        first, last = number * size, min((number + 1) * size, each["num_kept"])
        color = colors.own if len(owners[block]) > 1 else colors.accepted
        middle = (x + 0.5) * step
        _cell(ax, middle, 2.0, f"{first} to\n{last - 1}", color)
        to = (spot[block] + 0.5) * step
        ax.add_patch(FancyArrowPatch((middle, 1.98), (to, 1.04), arrowstyle="-|>", mutation_scale=13, color=color, lw=1.5,
                                     shrinkA=0, shrinkB=0))  # fmt: skip
        _cell(ax, to, 0.0, f"block\n{block}", color)
        ax.add_patch(FancyArrowPatch((count / 2, 4.05), (middle, 3.04), arrowstyle="-", color=colors.faint, lw=1.2,
                                     shrinkA=0, shrinkB=0, zorder=0))  # fmt: skip
        if x and number != shown[x - 1][0] + 1:
            ax.text(x * step, 2.5, "⋯", ha="center", va="center", fontsize=13, zorder=5)
    for x, (before, block) in enumerate(pairwise(in_memory), 1):
        if block != before + 1:
            ax.text(x * step, 0.5, "⋮", ha="center", va="center", fontsize=13, zorder=5)
    drafted = each["num_drafted"]
    what = f"newest token and {drafted} drafted" if drafted else "newest token"
    if not each["num_emitted"]:
        what = "a part of the prompt"
    ax.text(count / 2, 4.4, f"queries: {what}", ha="center", va="center", fontsize=12.5, weight="bold",
            bbox={"boxstyle": "round,pad=0.45", "facecolor": colors.ground, "edgecolor": colors.ink, "lw": 1.8})  # fmt: skip
    for y, text in (
        (2.5, "keys and values\nof the text,\nby position"),
        (0.5, "where they lie,\nin the order\nof memory"),
    ):
        ax.text(-0.25, y, text, ha="right", va="center", fontsize=11.5)
    ax.set(xlim=(-2.1, count + 0.1), ylim=(-0.5, 5.0))
    ax.set_title(f"How {each['request_id']} reads its {each['num_kept']} tokens out of {len(needed)} blocks")
    handles = [Line2D([], [], color=colors.accepted, lw=3, label="blocks of this row")]
    if any(len(owners[block]) > 1 for _, block in shown):
        handles.append(Line2D([], [], color=colors.own, lw=3, label="blocks that other rows read, too"))
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.55, 0.02), ncols=2, fontsize=11)
    caption(ax, f"{about(workload, row)}; pass {snapshot['index'] + 1}", conditions(workload.provenance))
    return ax


def _cell(ax: Axes, x: float, y: float, text: str, color: str) -> None:
    ax.add_patch(Rectangle((x - 0.42, y), 0.84, 1, fc=theme().ground, ec=color, lw=2))
    ax.text(x, y + 0.5, text, ha="center", va="center", fontsize=10)


def _cut(blocks: Sequence[int], most: int) -> list[tuple[int, int]]:
    """At most ``most`` (number in the text, block): the first and the last ones."""
    numbered = list(enumerate(blocks))
    if len(numbered) <= most:
        return numbered
    return [*numbered[: most // 2], *numbered[-(most - most // 2) :]]


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most ``most`` rows of lengths as different as there are, the longest first."""
    ranked = sorted(rows, key=lambda each: -int(each["num_kept"]))
    if len(ranked) <= most:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / (most - 1))] for i in range(most)]


def _owners(rows: Sequence[Row]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for each in rows:
        for block in each["blocks"]:
            owners.setdefault(block, []).append(each["request_id"])
    return owners


def _interest(row: Row) -> tuple[bool, int, int, int]:
    """How much there is to see of where a row's blocks lie."""
    blocks = row["blocks"]
    return blocks != sorted(blocks), _stretches(blocks), int(row["num_drafted"]), int(row["num_kept"])


def _stretches(blocks: Sequence[int]) -> int:
    """In how many pieces of memory blocks lie."""
    return 1 + sum(after != before + 1 for before, after in pairwise(blocks))
