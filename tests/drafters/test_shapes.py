"""Static shapes: Sequoia's programme against brute force and published figures, Medusa's growth against both."""

from __future__ import annotations

import itertools
import json
import pathlib
import random

import pytest
import torch

from specdec.drafters.trees.expansion import ChildSampling, Shape
from specdec.drafters.trees.growth import TreeBuilder
from specdec.drafters.trees.shapes import Path, StaticShape, Table, greedy_growth, path_probability, read_shape, sequoia
from specdec.interfaces import Limit, Row
from specdec.rng import PhiloxRng
from specdec.sampling import SamplingParams

# Sequoia's acceptance vector, published with four entries and dots.
VECTOR = [0.634, 0.108, 0.057, 0.022]


def all_shapes(num_nodes: int, max_rank: int) -> set[tuple[Path, ...]]:
    """Every shape of ``num_nodes`` nodes below the root, by adding one node at a time."""
    shapes: set[tuple[Path, ...]] = {()}
    for _ in range(num_nodes):
        shapes = {tuple(sorted((*shape, path))) for shape in shapes for path in frontier(shape, max_rank)}
    return shapes


def frontier(shape: tuple[Path, ...], max_rank: int) -> list[Path]:
    found = []
    for parent in ((), *shape):
        rank = sum(len(p) == len(parent) + 1 and p[:-1] == parent for p in shape)
        if rank < max_rank:
            found.append((*parent, rank))
    return found


def random_table(rng: random.Random, depths: int, ranks: int, *, falling: bool) -> Table:
    table = []
    for _ in range(depths):
        row = [rng.random() for _ in range(ranks)]
        total = sum(row) / rng.uniform(0.3, 1.0)
        row = [p / total for p in row]
        table.append(sorted(row, reverse=True) if falling else row)
    return table


def test_sequoias_published_figures_are_met():
    """The published vector ends in dots. The figures say how: where the rest falls by a fifth from rank to rank."""
    table = [VECTOR + [VECTOR[-1] * 0.8**i for i in range(1, 9)]]
    found = [round(sequoia(table, size - 1).expected_tokens(table), 2) for size in (4, 8, 16, 32, 64)]
    assert found == [2.29, 2.73, 3.13, 3.50, 3.85], "sizes count the root"


def test_what_the_published_vector_leaves_out_matters_in_large_trees_only():
    """Cut behind its fourth entry it still gives every figure but that of 64 nodes, which needs children beyond."""
    found = [sequoia([VECTOR], size - 1).expected_tokens([VECTOR]) for size in (4, 8, 16, 32, 64)]
    assert found == pytest.approx([2.29, 2.73, 3.13, 3.50, 3.81], abs=0.005)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_depth", [None, 2])
def test_the_programme_finds_what_trying_every_tree_finds(seed, max_depth):
    rng = random.Random(seed)
    table = random_table(rng, depths=rng.randint(1, 3), ranks=3, falling=bool(seed % 2))
    for num_nodes in range(6):
        fitting = [
            shape
            for size in range(num_nodes + 1)
            for shape in all_shapes(size, max_rank=3)
            if max_depth is None or max(map(len, shape), default=0) <= max_depth
        ]
        best = max(StaticShape(shape).expected_tokens(table) for shape in fitting)
        found = sequoia(table, num_nodes, max_depth)
        assert len(found.paths) <= num_nodes
        assert found.depth <= (max_depth or num_nodes)
        assert found.expected_tokens(table) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_growth_is_best_where_elder_siblings_are_likelier(seed):
    rng = random.Random(seed)
    table = random_table(rng, depths=3, ranks=4, falling=True)
    for num_nodes, max_depth in itertools.product((1, 3, 7, 12), (None, 3)):
        greedy = greedy_growth(table, num_nodes, max_depth)
        best = sequoia(table, num_nodes, max_depth)
        assert greedy.expected_tokens(table) == pytest.approx(best.expected_tokens(table), abs=1e-12)


def test_the_programme_looks_past_an_unlikely_elder_sibling():
    """Greedy growth stops at it: a rank is reached only through the ranks before."""
    table = [[0.1, 0.8], [0.3]]
    assert sequoia(table, 2).paths == ((0,), (1,))
    assert greedy_growth(table, 3).expected_tokens(table) <= sequoia(table, 3).expected_tokens(table)


def test_the_last_depth_of_a_table_holds_below_it():
    assert path_probability((0, 0, 0), [[0.5], [0.25]]) == pytest.approx(0.5 * 0.25 * 0.25)


def test_nothing_is_proposed_that_cannot_be_accepted():
    assert sequoia([[0.5, 0.0]], 4, max_depth=1).paths == ((0,),)
    assert greedy_growth([[0.5], [0.0]], 4).paths == ((0,),)
    assert sequoia([[0.5]], 0).paths == ()


def test_a_shape_is_drawn_with_the_probability_of_each_path():
    shape = StaticShape(((0,), (1,), (0, 0)))
    assert shape.parents == (-1, 0, 0, 1)
    assert shape.num_children(()) == 2
    assert shape.depth == 2
    assert shape.render([[0.5, 0.25]]).split("\n") == ["root", "  #1  0.500", "    #1  0.250", "  #2  0.250"]
    assert shape.render() == "root\n  #1\n    #1\n  #2"


@pytest.mark.parametrize("paths", [((0, 0),), ((1,),), ((0,), (0, 1)), ((),)])
def test_a_shape_with_a_missing_parent_or_elder_sibling_is_refused(paths):
    with pytest.raises(ValueError, match="the parent and the elder siblings of each node"):
        StaticShape(paths)


@pytest.mark.parametrize("make", [sequoia, greedy_growth])
@pytest.mark.parametrize(
    ("table", "num_nodes", "words"),
    [
        ([], 3, "at least one depth and one rank"),
        ([[]], 3, "at least one depth and one rank"),
        ([[0.7, 0.4]], 3, "sum to at most 1"),
        ([[-0.1]], 3, "probabilities"),
        ([[float("nan")]], 3, "probabilities"),
        ([[0.5]], -1, "num_nodes must be 0 or more"),
    ],
)
def test_what_is_no_table_is_refused(make, table, num_nodes, words):
    with pytest.raises(ValueError, match=words):
        make(table, num_nodes)


def test_a_shape_is_read_from_choices(tmp_path: pathlib.Path) -> None:
    """From a file of ``specdec tune``: test_tuning.py, with one that the command wrote."""
    choices = tmp_path / "choices.json"
    choices.write_text(json.dumps({"choices": [[0, 0], [0], [1], [0]]}))
    assert read_shape(str(choices), 16).paths == ((0,), (1,), (0, 0))


CHOICES = ("3", "[]", "[3]", '[["a"]]', "[[0.5]]", "[[-1]]", "[[1]]", "[[]]")
NO_SHAPES = ["{}", "[1]", "null", "no json", '{"entries": []}', *(f'{{"choices": {each}}}' for each in CHOICES)]


@pytest.mark.parametrize("content", [*NO_SHAPES, '{"kind": "tuned"}', '{"kind": "bench", "schema": 1}'])
def test_a_file_without_a_shape_is_refused_with_what_it_needs(tmp_path: pathlib.Path, content: str) -> None:
    file = tmp_path / "shape.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="choices"):
        read_shape(str(file), 8)


def test_a_draft_model_follows_a_static_shape() -> None:
    """Each node gets as many children as the shape has below its ranks; a shape is cut to chains where it must be."""
    shape = Shape(static=StaticShape(((0,), (1,), (2,), (0, 0), (1, 0), (1, 1), (1, 1, 0))))
    row, logits = Row(0, [1, 2], 20), torch.arange(6.0)
    for limit, parents in (
        (Limit(4, 16), (-1, 0, 0, 0, 1, 2, 2, 6)),
        (Limit(2, 16), (-1, 0, 0, 0, 1, 2, 2)),
        (Limit(4, 16, chain_only=True), (-1, 0, 1)),
    ):
        tree = TreeBuilder(row, limit, shape, ChildSampling.CERTAIN, SamplingParams(), PhiloxRng(0).at(0, 2))
        while tree.frontier:
            tree.expand(logits.expand(len(tree.frontier), -1))
        assert tree.proposal().parents == parents
