"""Static tree shapes from measured acceptance: Medusa's greedy growth and Sequoia's dynamic programme.

An acceptance table says how likely the child of a given rank (0: tried first) is accepted after its elder siblings
failed, for each depth of the parent: ``table[depth][rank]``. A shape is a set of rank paths, as in Medusa's choices:
(0, 2) is the third child of the root's first child. Letters: D depths, R ranks.
"""

from __future__ import annotations

import heapq
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import index

from specdec.records.tuned import KIND, load_tuned

Path = tuple[int, ...]
Table = Sequence[Sequence[float]]  # (D, R)


@dataclass(frozen=True, slots=True)
class StaticShape:
    """Which ranks are proposed below which: every prefix of a path, and every smaller rank, is a path too."""

    paths: tuple[Path, ...]  # without the root

    def __post_init__(self) -> None:
        paths = set(self.paths)
        for path in self.paths:
            if (
                not path
                or path[-1] < 0
                or (path[:-1] and path[:-1] not in paths)
                or (path[-1] > 0 and (*path[:-1], path[-1] - 1) not in paths)
            ):
                raise ValueError(f"a shape must hold the parent and the elder siblings of each node, not so for {path}")

    def num_children(self, path: Path) -> int:
        """How many children the node at ``path`` has."""
        return sum(len(p) == len(path) + 1 and p[:-1] == path for p in self.paths)

    @property
    def depth(self) -> int:
        return max(map(len, self.paths), default=0)

    @property
    def parents(self) -> tuple[int, ...]:
        """(n,) of the tree with the root as node 0."""
        place = {path: i for i, path in enumerate(((), *self.paths))}
        return (-1, *(place[path[:-1]] for path in self.paths))

    def expected_tokens(self, table: Table) -> float:
        """Tokens a step, the target's own included, if ``table`` holds."""
        return 1.0 + sum(path_probability(path, table) for path in self.paths)

    def render(self, table: Table | None = None) -> str:
        """The shape as indented text, one node a line, with the probability of its path if ``table`` is given."""
        lines = ["root"]
        for path in sorted(self.paths):
            note = "" if table is None else f"  {path_probability(path, table):.3f}"
            lines.append("  " * len(path) + f"#{path[-1] + 1}{note}")
        return "\n".join(lines)


def path_probability(path: Path, table: Table) -> float:
    """The product of the acceptance probabilities along ``path``; 0 outside the table."""
    value = 1.0
    for depth, rank in enumerate(path):
        value *= _entry(table, depth, rank)
    return value


def _entry(table: Table, depth: int, rank: int) -> float:
    row = table[min(depth, len(table) - 1)]
    return row[rank] if rank < len(row) else 0.0


def _check(table: Table, num_nodes: int) -> None:
    if not table or any(not row for row in table):
        raise ValueError("an acceptance table needs at least one depth and one rank")
    if any(not 0 <= p <= 1 for row in table for p in row) or any(sum(row) > 1 + 1e-6 for row in table):
        raise ValueError(f"each depth of an acceptance table holds probabilities that sum to at most 1, got {table}")
    if num_nodes < 0:
        raise ValueError(f"num_nodes must be 0 or more, got {num_nodes}")


def greedy_growth(table: Table, num_nodes: int, max_depth: int | None = None) -> StaticShape:
    """Always add the most probable path: Medusa's rule (Cai et al., 2024), exact where ranks fall in probability.

    Unlike Medusa's tables, in which a rank's entry is its plain accuracy, an entry here is that of a rank reached
    after its elders failed times the chance of that; both mean "this child is the one".

    Args:
        table: (D, R); the last depth holds for all deeper ones.
        num_nodes: nodes below the root.
        max_depth: of the tree; None: any.
    """
    _check(table, num_nodes)
    paths: list[Path] = []
    heap: list[tuple[float, Path]] = [(-_entry(table, 0, 0), (0,))]
    while heap and len(paths) < num_nodes:
        negative, path = heapq.heappop(heap)
        if negative >= 0:
            break
        paths.append(path)
        sibling = (*path[:-1], path[-1] + 1)
        heapq.heappush(heap, (-path_probability(sibling, table), sibling))
        if max_depth is None or len(path) < max_depth:
            heapq.heappush(heap, (-path_probability((*path, 0), table), (*path, 0)))
    return StaticShape(tuple(sorted(paths, key=lambda p: (len(p), p))))


def sequoia(table: Table, num_nodes: int, max_depth: int | None = None) -> StaticShape:
    """The tree of ``num_nodes`` nodes below the root with most expected tokens, by dynamic programming.

    Sequoia (Chen et al., 2024): T[m][l][b] = max over y of T[y][l][b-1] + p[b] max over b' of T[m-y][l-1][b'], here
    with probabilities that may differ by depth.
    """
    _check(table, num_nodes)
    deepest = num_nodes if max_depth is None else max_depth

    @cache
    def best(nodes: int, depth: int) -> tuple[float, tuple[int, ...]]:
        """(expected tokens, size of each child's subtree) of a subtree of ``nodes`` nodes whose root is at ``depth``."""
        if nodes <= 1 or depth >= deepest:
            return 1.0, ()
        value, sizes = with_children(nodes - 1, depth, 0)
        return 1.0 + value, sizes

    @cache
    def with_children(nodes: int, depth: int, rank: int) -> tuple[float, tuple[int, ...]]:
        """The best use of at most ``nodes`` nodes for the children of ``rank`` and later."""
        prob = _entry(table, depth, rank)
        top: tuple[float, tuple[int, ...]] = (0.0, ())
        if prob <= 0 or nodes < 1:
            return top
        for size in range(1, nodes + 1):
            inner, _ = best(size, depth + 1)
            rest, sizes = with_children(nodes - size, depth, rank + 1)
            value = prob * inner + rest
            if value > top[0] + 1e-12:
                top = (value, (size, *sizes))
        return top

    paths: list[Path] = []

    def collect(path: Path, nodes: int) -> None:
        for rank, size in enumerate(best(nodes, len(path))[1]):
            paths.append((*path, rank))
            collect((*path, rank), size)

    collect((), num_nodes + 1)
    return StaticShape(tuple(sorted(paths, key=lambda p: (len(p), p))))


def read_shape(file: str, num_nodes: int) -> StaticShape:
    """The shape in a JSON file: its ``choices``, or Sequoia's best ``num_nodes`` nodes for the table of a tuned file.

    Raises:
        ValueError: the file cannot be read, or holds neither.
    """
    try:
        content = json.loads(pathlib.Path(file).expanduser().read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the shape in {file}: {error.strerror}") from None
    except ValueError:
        content = None
    try:
        if isinstance(content, dict) and "choices" in content:
            paths = {tuple(map(index, path)) for path in content["choices"]}
            shape = StaticShape(tuple(sorted(paths, key=lambda path: (len(path), path))))
        elif isinstance(content, dict) and content.get("kind") == KIND:
            shape = _measured_shape(file, num_nodes)
        else:
            raise TypeError("it has neither")
        if not shape.paths:
            raise ValueError("its tree is empty")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} holds no tree shape ({error}): it needs choices ([[0], [1], [0, 0], ...]), or a table measured by "
            "specdec tune"
        ) from None
    return shape


def _measured_shape(file: str, num_nodes: int) -> StaticShape:
    """The best shape for the smallest batch size that a tuned file has a table for."""
    table = next((entry.acceptance_table for entry in load_tuned(file).entries if entry.acceptance_table), None)
    if table is None:
        raise ValueError("it has no acceptance table, because too few drafts were verified")
    return sequoia(table, num_nodes)
