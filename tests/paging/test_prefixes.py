"""The tree of prefixes against a list of everything that was ever put into it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from pool_checks import check_pool

from specdec.paging.pool import BlockPool
from specdec.paging.prefixes import PrefixTree


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def insert(tree: PrefixTree, tokens: Sequence[int]) -> None:
    blocks = tree.pool.allocate(tree.pool.blocks_for(len(tokens)))
    tree.insert(tokens, blocks)
    tree.pool.release(blocks)


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("seed", range(3))
def test_the_longest_known_prefix_is_found_to_the_token(seed: int, size: int) -> None:
    rng, pool = random.Random(seed), BlockPool(4000, size)
    tree, texts = PrefixTree(pool), list[list[int]]()
    for _ in range(60):
        base = rng.choice(texts)[: rng.randrange(60)] if texts and rng.random() < 0.7 else []
        text = base + [rng.randrange(3) for _ in range(rng.randrange(1, 50))]
        expected = max((shared(text, other) for other in texts), default=0)
        match = tree.match(text)
        assert match.length == expected
        assert len(match.blocks) == expected // size
        assert (match.partial is not None) == (expected % size > 0)
        insert(tree, text)
        texts.append(text)
        assert tree.match(text).length == len(text)
        check_pool(pool, [], tree)


def test_leaves_are_given_up_first_and_what_was_used_least_recently() -> None:
    pool = BlockPool(10, 2)
    tree = PrefixTree(pool)
    for text in ([1, 1, 2, 2], [1, 1, 3, 3], [4, 4]):
        insert(tree, text)
    tree.match([1, 1, 2, 2])
    assert tree.evict(1) == 1
    assert [tree.match(text).length for text in ([1, 1, 3, 3], [4, 4], [1, 1, 2, 2])] == [2, 2, 4]
    assert tree.evict(2) == 2  # [4, 4] is younger by that look, so [1, 1, 2, 2] and ...
    assert sorted(tree.paths()) == [(1, 1)] or sorted(tree.paths()) == [(4, 4)]
    check_pool(pool, [], tree)


def test_what_a_row_holds_stays() -> None:
    pool = BlockPool(4, 2)
    tree = PrefixTree(pool)
    insert(tree, [1, 1, 2, 2, 3, 3])
    held = tree.match([1, 1, 2, 2]).blocks
    pool.hold(held)
    assert tree.evict(10) == 1
    assert tree.match([1, 1, 2, 2]).length == 4
    assert len(pool.allocate(2)) == 2
    pool.release(held)
    assert tree.evict(10) == 2
    assert pool.num_free == 2


def test_a_longer_text_takes_the_place_of_its_beginning() -> None:
    pool = BlockPool(8, 4)
    tree = PrefixTree(pool)
    insert(tree, [1, 2])
    insert(tree, [1, 2, 3])
    assert tree.num_blocks == 1
    insert(tree, [1])  # known
    assert list(tree.paths()) == [(1, 2, 3)]
    insert(tree, [1, 2, 3, 4, 5])
    assert list(tree.paths()) == [(1, 2, 3, 4, 5)]
    check_pool(pool, [], tree)


def test_a_very_long_text() -> None:
    pool = BlockPool(5000, 16)
    tree = PrefixTree(pool)
    text = [i % 7 for i in range(64_000)]
    insert(tree, text)
    assert tree.match(text).length == len(text)
    assert next(tree.paths()) == tuple(text)
    assert tree.evict(4000) == 4000
    assert pool.num_free == 5000
