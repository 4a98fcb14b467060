"""The pool of blocks: nothing is lost, nothing is handed out twice, and rows lie in one piece where they can."""

from __future__ import annotations

import random

import pytest
from pool_checks import check_pool

from specdec.errors import OutOfBlocksError
from specdec.paging.pool import BlockPool


@pytest.mark.parametrize("seed", range(4))
def test_free_and_held_blocks_are_all_there_is(seed: int) -> None:
    rng, pool = random.Random(seed), BlockPool(37, 4)
    rows: list[list[int]] = []
    for _ in range(3000):
        action = rng.random()
        if action < 0.4:
            size = rng.randrange(1, 9)
            if size <= pool.num_free:
                rows.append(pool.allocate(size))
            else:
                before = pool.num_free
                with pytest.raises(OutOfBlocksError, match=f"{size} blocks"):
                    pool.allocate(size)
                assert pool.num_free == before
        elif action < 0.6 and rows and pool.num_free:
            row = rng.choice(rows)
            row += pool.allocate(1, row[-1] if row else None)
        elif action < 0.75 and rows:  # a row with the same beginning
            row = rng.choice(rows)
            shared = row[: rng.randrange(len(row) + 1)]
            pool.hold(shared)
            rows.append(list(shared))
        elif rows:
            pool.release(rows.pop(rng.randrange(len(rows))))
        check_pool(pool, rows)
    for row in rows:
        pool.release(row)
    assert pool.num_free == pool.num_blocks


def test_rows_that_grow_by_turns_lie_in_one_piece() -> None:
    pool = BlockPool(256, 16)
    rows = [pool.allocate(2) for _ in range(4)]
    for _ in range(20):
        for row in rows:
            row += pool.allocate(1, row[-1])
    assert all(row == list(range(row[0], row[0] + 22)) for row in rows)


def test_a_pool_asks_to_reclaim_before_it_refuses() -> None:
    pool = BlockPool(4, 16)
    idle = pool.allocate(3)
    asked: list[int] = []

    def reclaim(count: int) -> int:
        asked.append(count)
        pool.release([idle.pop() for _ in range(min(count, len(idle)))])
        return count

    pool.reclaim = reclaim
    assert len(pool.allocate(3)) == 3
    assert asked == [2]
    with pytest.raises(OutOfBlocksError, match="4 blocks of the key-value cache are needed and 1 of 4"):
        pool.allocate(4)


def test_what_is_free_cannot_be_held_or_released() -> None:
    pool = BlockPool(2, 16)
    block = pool.allocate(1)[0]
    pool.release([block])
    with pytest.raises(ValueError, match="is free"):
        pool.hold([block])
    with pytest.raises(ValueError, match="is free already"):
        pool.release([block])
    with pytest.raises(ValueError, match="at least one block of one slot, got 0 of 16"):
        BlockPool(0)
