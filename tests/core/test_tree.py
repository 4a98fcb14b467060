"""Token trees: what is refused, and the questions a tree answers."""

from __future__ import annotations

import pytest
import torch
from toy import is_path

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
    assert is_path(TREE, nodes) is expected


@pytest.mark.parametrize(
    ("parents", "expected"),
    [((-1,), True), ((-1, 0), True), ((-1, 0, 1, 2), True), ((-1, 0, 0), False), ((-1, 0, 1, 1), False)],
)
def test_a_chain_has_no_branches(parents: tuple[int, ...], expected: bool) -> None:
    assert TokenTree(tuple(range(len(parents))), parents).is_chain is expected


def test_a_drawn_chain_names_the_row_of_draft_probs_for_each_node() -> None:
    tree = TokenTree.chain(5, [1, 2], PROBS)
    assert (tree.tokens, tree.parents, tree.sources) == ((5, 1, 2), (-1, 0, 1), (-1, 0, 1))
    assert tree.draws == (Draw.INDEPENDENT, Draw.INDEPENDENT)
    assert tree.drawn == {Draw.INDEPENDENT}
    assert not tree.is_certain
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


BOTH = (Draw.INDEPENDENT, Draw.WITHOUT_REPLACEMENT)


def test_equal_siblings_are_refused_where_they_cannot_have_been_chosen() -> None:
    """Guards rules 2 and 5, which are wrong for duplicates. Cousins may be equal."""
    for sources, draws in (((), ()), ((-1, 0, 0), (Draw.WITHOUT_REPLACEMENT,)), ((-1, -1, -1), (Draw.INDEPENDENT,))):
        with pytest.raises(ValueError, match="siblings of one source must hold different tokens"):
            TokenTree((9, 1, 1), (-1, 0, 0), sources, PROBS[:1] if draws else None, draws)
    assert len(TokenTree((9, 1, 2, 1), (-1, 0, 0, 2))) == 4


def test_equal_siblings_of_different_origin_or_independent_draws_are_kept() -> None:
    """Merged trees need them: each is an attempt of its own."""
    assert TokenTree((9, 1, 1), (-1, 0, 0), (-1, 0, 0), PROBS[:1], BOTH[:1]).children()[0] == [1, 2]
    tree = TokenTree((9, 1, 1, 1), (-1, 0, 0, 0), (-1, 1, -1, 0), PROBS, BOTH)
    assert [tree.source(node) for node in range(4)] == [-1, 1, -1, 0]
    assert tree.drawn == set(BOTH)


def test_a_tree_without_drawn_nodes_is_certain() -> None:
    assert TREE.is_certain
    assert TREE.source(3) == -1
    assert TokenTree((9, 1), (-1, 0), (-1, -1), PROBS, BOTH).is_certain


@pytest.mark.parametrize("sources", [(), (-1,), (-1, 2), (-1, -2), (-1, 0, 0)])
def test_sources_must_name_a_row_for_each_node(sources: tuple[int, ...]) -> None:
    """Guards forgotten sources: the verifier would take drawn tokens for certain ones."""
    with pytest.raises(ValueError, match="sources must name one of the 2 rows"):
        TokenTree((9, 1), (-1, 0), sources, PROBS, BOTH)


@pytest.mark.parametrize(("probs", "draws"), [(None, BOTH[:1]), (PROBS[0], BOTH), (PROBS, BOTH[:1]), (PROBS, ())])
def test_drawn_nodes_need_the_distributions_that_they_were_drawn_from(
    probs: torch.Tensor | None, draws: tuple[Draw, ...]
) -> None:
    with pytest.raises(ValueError, match="drawn nodes need draft_probs of shape"):
        TokenTree((9, 1), (-1, 0), (-1, 0), probs, draws)


def test_a_row_of_draft_probs_belongs_to_one_parent() -> None:
    """Guards draws without replacement that would lose tokens to their cousins."""
    with pytest.raises(ValueError, match="a row of draft_probs belongs to the children of one node"):
        TokenTree((9, 1, 2), (-1, 0, 1), (-1, 0, 0), PROBS[:1], BOTH[:1])


def test_nodes_of_equal_path_are_united_for_scoring() -> None:
    """Guards the cache: each node's place is one with the same path, and a tree without repeats stays itself."""
    tokens, parents = (9, 1, 1, 2, 2, 1, 3), (-1, 0, 0, 1, 2, 0, 4)
    tree = TokenTree(tokens, parents, (-1, 0, 0, -1, -1, -1, -1), PROBS[:1], BOTH[:1])
    compact, where = tree.compact()
    assert len(compact) == 4
    assert [compact.path_tokens(place) for place in where] == [tree.path_tokens(node) for node in range(7)]
    assert TREE.compact() == (TREE, list(range(7)))
