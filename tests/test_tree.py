"""Token trees: what is refused, and the questions a tree answers."""

from __future__ import annotations

import pytest
import torch

from specdec.tree import Draw, TokenTree, ancestor_matrix

#        0
#      /   \
#     1     2
#    / \     \
#   3   4     5
#             |
#             6
PARENTS = (-1, 0, 0, 1, 1, 2, 5)
TREE = TokenTree((9, 1, 2, 3, 4, 3, 1), PARENTS)
PROBS = torch.full((2, 4), 0.25)


def test_a_tree_knows_its_paths_depths_and_children() -> None:
    assert len(TREE) == 7
    assert TREE.path(6) == [0, 2, 5, 6]
    assert TREE.path(0) == [0]
    assert TREE.path_tokens(6) == [2, 3, 1]
    assert TREE.path_tokens(0) == []
    assert TREE.depths() == [0, 1, 1, 2, 2, 2, 3]
    assert TREE.children() == [[1, 2], [3, 4], [5], [], [], [6], []]


def test_ancestors_are_the_nodes_of_each_path() -> None:
    matrix = TREE.ancestors()
    assert matrix.shape == (7, 7)
    for node in range(7):
        assert set(matrix[node].nonzero()[0].tolist()) == set(TREE.path(node))
    assert (ancestor_matrix(PARENTS) == matrix).all()


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([0], True),
        ([0, 2, 5, 6], True),
        ([0, 2], True),
        ([], False),
        ([2, 5], False),
        ([0, 5], False),
        ([0, 1, 5], False),
    ],
)
def test_a_path_starts_at_the_root_and_leaves_nothing_out(nodes: list[int], expected: bool) -> None:
    assert TREE.is_path(nodes) is expected


@pytest.mark.parametrize(
    ("parents", "expected"),
    [((-1,), True), ((-1, 0), True), ((-1, 0, 1, 2), True), ((-1, 0, 0), False), ((-1, 0, 1, 1), False)],
)
def test_a_chain_has_no_branches(parents: tuple[int, ...], expected: bool) -> None:
    assert TokenTree(tuple(range(len(parents))), parents).is_chain is expected


def test_a_drawn_chain_names_the_row_of_draft_probs_for_each_node() -> None:
    tree = TokenTree.chain(5, [1, 2], PROBS)
    assert (tree.tokens, tree.parents, tree.sources, tree.draw) == ((5, 1, 2), (-1, 0, 1), (-1, 0, 1), Draw.INDEPENDENT)
    assert tree.draft_probs is PROBS
    assert tree.is_chain


def test_a_chain_without_probabilities_is_certain_and_an_empty_one_is_a_root() -> None:
    assert TokenTree.chain(5, [1, 2]) == TokenTree((5, 1, 2), (-1, 0, 1))
    assert TokenTree.chain(5, [], PROBS[:0]) == TokenTree.root(5)


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [
        ((), ()),
        ((1, 2), (-1,)),
        ((1,), (0,)),
        ((1, 2), (-1, -1)),
        ((1, 2), (-1, 1)),
        ((1, 2, 3), (-1, 2, 0)),
        ((1, 2, 3), (-1, 0, 5)),
    ],
)
def test_parents_that_form_no_tree_are_refused(tokens: tuple[int, ...], parents: tuple[int, ...]) -> None:
    """Guards masks and walks, which rely on topological order."""
    with pytest.raises(ValueError, match="parent"):
        TokenTree(tokens, parents)


@pytest.mark.parametrize("draw", [Draw.CERTAIN, Draw.WITHOUT_REPLACEMENT, Draw.TOP_PLUS_ONE])
def test_equal_siblings_are_refused_unless_drawn_with_replacement(draw: Draw) -> None:
    """Guards rules 2 and 5, which are wrong for duplicates. Cousins may be equal."""
    certain = draw is Draw.CERTAIN
    rest = () if certain else (PROBS, (-1, 0, 0, 1))
    with pytest.raises(ValueError, match="siblings must hold different tokens"):
        TokenTree((9, 1, 1), (-1, 0, 0), draw, *(() if certain else (PROBS, (-1, 0, 0))))
    assert len(TokenTree((9, 1, 2, 1), (-1, 0, 0, 2), draw, *rest)) == 4


def test_equal_siblings_drawn_with_replacement_are_kept() -> None:
    assert TokenTree((9, 1, 1), (-1, 0, 0), Draw.INDEPENDENT, PROBS, (-1, 0, 1)).children()[0] == [1, 2]


@pytest.mark.parametrize("sources", [(), (-1,), (-1, 2), (-1, -1), (-1, 0, 0)])
def test_sources_must_name_a_row_for_each_node(sources: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sources must name one of the 2 rows"):
        TokenTree((9, 1), (-1, 0), Draw.INDEPENDENT, PROBS, sources)


@pytest.mark.parametrize("probs", [None, PROBS[0]])
def test_a_drawn_tree_needs_the_distributions_it_was_drawn_from(probs: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="needs draft_probs of shape"):
        TokenTree((9, 1), (-1, 0), Draw.INDEPENDENT, probs, (-1, 0))


def test_a_certain_tree_carries_no_distributions() -> None:
    """Guards a forgotten ``draw=``: the verifier would take drawn tokens for certain ones."""
    for rest in ((PROBS, (-1, 0)), (PROBS,), (None, (-1, 0))):
        with pytest.raises(ValueError, match="name its draw or leave them out"):
            TokenTree((9, 1), (-1, 0), Draw.CERTAIN, *rest)
