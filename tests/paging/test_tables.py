"""Block tables under random rows: every row reads its own text, whoever it shares blocks with, and nothing leaks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from pool_checks import check_pool
from textual_store import TextualStore

from specdec.errors import OutOfBlocksError
from specdec.interfaces import Row
from specdec.paging import tables as module
from specdec.paging.pool import BlockPool
from specdec.paging.prefixes import PrefixTree
from specdec.paging.tables import BlockTables


def run(seed: int, size: int = 4, num_steps: int = 400, num_blocks: int = 60, fails: float = 0.05) -> int:
    """Rows that open, grow by verified tokens behind trees, share, and close; the tokens that shared prefixes spared."""
    rng, pool = random.Random(seed), BlockPool(num_blocks, size)
    tree = PrefixTree(pool)
    tables = BlockTables(pool, tree)
    target, follower = TextualStore(tables), TextualStore(tables, must_follow=True)
    draft = TextualStore(tables, lag=rng.randrange(3))
    stores = (target, follower, draft)
    texts: list[list[int]] = []
    rows: list[Row] = []
    spared = 0

    def allocation_fails(num_blocks: int, behind: int | None = None) -> list[int]:
        if rng.random() < fails:
            raise OutOfBlocksError("by chance")
        return BlockPool.allocate(pool, num_blocks, behind)

    pool.allocate = allocation_fails  # type: ignore[method-assign]
    for step in range(num_steps):
        try:
            if len(rows) < 4:
                text = rng.choice(texts) if texts and rng.random() < 0.8 else []
                text = text[: rng.randrange(len(text) + 1)] + [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
                row = Row(step, text, 200)
                spared += tables.open(row).num_cached
                rows.append(row)
                for store in stores:
                    store.open(row)
            row = rng.choice(rows)
            grow(rng, tables, stores, row)
            if rng.random() < 0.3:
                tables.share(row, min(target.kept[row], len(row.tokens) - 1))
            if rng.random() < 0.3:
                tables.trim(row, target.kept[row] + 1)
        except OutOfBlocksError:
            pass
        if rows and (rng.random() < 0.2 or len(row.tokens) > 60):
            close(rng, tables, stores, rows.pop(rng.randrange(len(rows))), texts)
        for row in rows:
            for store in stores:
                store.check(row)
        check_pool(pool, [tables[row].blocks for row in rows], tree)
    for row in rows:
        close(rng, tables, stores, row, texts)
    tree.clear()
    assert pool.num_free == pool.num_blocks
    return spared


def grow(rng: random.Random, tables: BlockTables, stores: tuple[TextualStore, ...], row: Row) -> None:
    """One step: the text so far is computed, a tree stands behind it, and a part of that is accepted."""
    base = len(row.tokens) - 1
    tables.reserve(row, base + 7)
    for store in stores:
        store.write(row, base, [*row.tokens[:base], *(9 for _ in range(5))])  # nodes, most of them rejected
        store.fill(row, base)
    accepted = [rng.randrange(2) for _ in range(rng.randrange(4))]
    root, row.tokens = row.tokens[-1], [*row.tokens, *accepted, rng.randrange(2)]
    assert root == row.tokens[base]
    stores[0].fill(row, len(row.tokens) - 1)


def close(
    rng: random.Random, tables: BlockTables, stores: tuple[TextualStore, ...], row: Row, texts: list[list[int]]
) -> None:
    if rng.random() < 0.3:  # it ended before what was accepted last
        del row.tokens[-rng.randrange(1, 3) :]
        row.tokens = row.tokens or [0]
    length = min(stores[0].kept[row], len(row.tokens) - 1)
    tables.close(row, length)
    texts.append(list(row.tokens))
    for store in stores:
        del store.kept[row]


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_reads_its_own_text(seed: int, size: int) -> None:
    assert run(seed, size) > 50  # prefixes were shared


def write_in_shared_blocks(self: BlockTables, row: Row) -> Any:
    table = true_open(self, row)
    if self.tree is not None and (match := self.tree.match(row.tokens[:-1])).partial is not None:
        self.pool.hold([match.partial])
        self.pool.release(table.blocks[len(match.blocks) : len(match.blocks) + 1])
        table.blocks[len(match.blocks) :] = [match.partial]
    return table


def forget_what_is_filled(self: BlockTables, row: Row) -> None:
    for store, filled in self._filled.items():
        del store
        filled[self[row].blocks] = self.pool.block_size


def keep_the_newest_token(self: BlockTables, row: Row, length: int) -> None:
    true_close(self, row, min(length + 1, len(row.tokens)))


true_open, true_close, true_allocate = BlockTables.open, BlockTables.close, BlockTables._allocate
BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "a partly used block is not copied": ("open", write_in_shared_blocks),
    "a draft model's lag is forgotten": ("note_filled", forget_what_is_filled),
    "the newest token counts as known": ("close", keep_the_newest_token),
    "a new block counts as filled": ("_allocate", lambda self, n, behind: self.pool.allocate(n, behind)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_check_sees_broken_tables(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.BlockTables, *BROKEN[fault])
    with pytest.raises((AssertionError, ValueError, LookupError)):
        sum(map(run, range(5)))
