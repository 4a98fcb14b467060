"""The tree of prefixes that an engine knows, as it was in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from specdec.analysis.figures.serving import about, paged_row
from specdec.analysis.figures.style import MissingDataError, caption, conditions, in_theme, new_axes, shown, theme
from specdec.analysis.results import Workload

Node = Mapping[str, Any]
_LEAVES, _SPAN, _SIGNS = 9, 10.0, 11.5  # drawn at most; width of the tree; signs a unit of width


@in_theme
def radix_tree_structure(workload: Workload, ax: Axes | None = None) -> Axes:
    """Which texts the cache knows, where they part, and how many rows use each part."""
    row = paged_row(workload)
    nodes: Sequence[Node] = row["kv"]["snapshot"]["prefixes"]
    if not any(node["parent"] >= 0 for node in nodes):
        raise MissingDataError("a workload whose texts begin alike, such as --workload prefix")
    ax, colors = new_axes(ax), theme()
    ax.set_axis_off()
    kept, left_out = _kept(nodes)
    places = _places(nodes, kept)
    step = _SPAN / (1 + max(depth for depth, _ in places.values()))
    width = min(0.8 * step, 4.0)
    for i in kept:
        node, (depth, y) = nodes[i], places[i]
        users = int(node["num_holders"]) - 1
        color = colors.own if users > 1 else colors.accepted if users else colors.faint
        if node["parent"] >= 0:
            above = places[node["parent"]]
            ax.plot([above[0] * step + width, depth * step], [above[1], y], color=color, lw=1 + min(users, 8) / 2,
                    zorder=0)  # fmt: skip
        ax.add_patch(
            FancyBboxPatch((depth * step, y - 0.36), width, 0.72, boxstyle="round,pad=0,rounding_size=0.08",
                           fc=colors.ground, ec=color, lw=2)
        )  # fmt: skip
        text = shown(" ".join(str(node["text"]).split()), int(_SIGNS * width)).replace("·", " ")
        ax.text(depth * step + 0.08, y + 0.14, text, va="center", fontsize=9.5, parse_math=False)
        used = f"{users} row{'s' * (users != 1)}" if users else "no row now"
        ax.text(depth * step + 0.08, y - 0.16, f"{node['num_tokens']} tokens, {used}", va="center", fontsize=9.5)
    bottom = min(y for _, y in places.values())
    if left_out:
        ax.text(0, bottom - 0.85, f"and {left_out} more", fontsize=11, va="center")
    ax.set(xlim=(-0.1, _SPAN - step + width + 0.1), ylim=(bottom - 1.1, 0.7))
    tokens = sum(int(node["num_tokens"]) for node in nodes)
    ax.set_title(f"The tree of known prefixes: {tokens} tokens in {sum(len(node['blocks']) for node in nodes)} blocks")
    caption(
        ax,
        f"{about(workload, row)}; pass {row['kv']['snapshot']['index'] + 1}; a line is as thick as rows use what is behind "
        f"it; {row['prefix_hit_rate']:.0%} of all prompt tokens were found in the cache",
        conditions(workload.provenance),
    )
    return ax


def _kept(nodes: Sequence[Node]) -> tuple[list[int], int]:
    """The nodes to draw: those that most rows use, with all above them, and few enough to be read; how many are not."""
    kept: set[int] = set()
    for i in sorted(range(len(nodes)), key=lambda i: (-int(nodes[i]["num_holders"]), i)):
        path, at = set[int](), i
        while at >= 0:
            path.add(at)
            at = int(nodes[at]["parent"])
        above = {int(nodes[j]["parent"]) for j in kept | path}
        if len((kept | path) - above) <= _LEAVES:
            kept |= path
    return sorted(kept), len(nodes) - len(kept)


def _places(nodes: Sequence[Node], kept: Sequence[int]) -> dict[int, tuple[int, float]]:
    """Depth and height of each node: leaves from top to bottom, a parent in the middle of what is below it."""
    below: dict[int, list[int]] = {}
    for i in kept:
        below.setdefault(int(nodes[i]["parent"]), []).append(i)
    places: dict[int, tuple[int, float]] = {}
    next_leaf = 0.0

    def place(i: int, depth: int) -> float:
        nonlocal next_leaf
        heights = [place(child, depth + 1) for child in below.get(i, [])]
        if heights:
            y = (heights[0] + heights[-1]) / 2
        else:
            y, next_leaf = next_leaf, next_leaf - 1
        places[i] = depth, y
        return y

    for root in below.get(-1, []):
        place(root, 0)
    return places
