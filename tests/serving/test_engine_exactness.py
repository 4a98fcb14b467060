"""Every request gets the tokens that it would get alone, whatever runs beside it and wherever its keys are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from crowd import Case, alone, crowd, differing, engine

from specdec.engine import flat_pass, paged_rows
from specdec.paging.tables import BlockTables
from specdec.serving.per_request import RequestRng
from specdec.serving.request import RequestSettings

CASES = [
    *(Case(drafter) for drafter in ("none", "ngram", "recycling", "hybrid", "model:shape=chain", "model:shape=best-first")),
    *(Case(block_size=size, num_blocks=count) for size, count in ((1, 150), (64, 6), (16, 12))),
    *(Case(block_size=size, num_blocks=count, sharing=False) for size, count in ((1, 150), (16, 12), (16, 100))),
    *(Case(budget=budget) for budget in (1, 16, 4096)),
    Case("model:shape=best-first", 16, 14),
    Case("hybrid:parts=ngram+model", 4, 60, adaptive=False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_crowd_changes_nothing(case: Case) -> None:
    with engine(case) as made:
        assert not differing(made, crowd())
        metrics = made.metrics()
        finished = made.metrics().requests_finished
        is_short = case.num_blocks * case.block_size < 200
    assert finished == {"length": 22}
    assert metrics.generated_tokens == sum(len(alone(tuple(p), t)) for p in crowd() for t in (0.0, 1.0))
    assert (metrics.cached_tokens > 100) == case.sharing
    assert metrics.preemptions > 0 or not is_short


@pytest.mark.parametrize("drafter", ["model:shape=best-first", "hybrid"])
def test_rows_side_by_side_get_the_same(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model does not take our attention, what rows see is gathered."""
    monkeypatch.setattr("specdec.runtime.on_our_attention", lambda model: model)
    with engine(Case(drafter)) as made:
        assert not made._target._rows.is_flat  # type: ignore[attr-defined]
        assert not differing(made, crowd())


@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
def test_a_crowd_changes_nothing_under_verifiers_that_draw(verifier: str) -> None:
    """Their texts hang on the drafts, which are the same in any batch if trees are as large."""
    settings = [RequestSettings(max_new_tokens=16, temperature=0.8, seed=i, stop_token_ids=()) for i in range(11)]
    case = Case("model:shape=3x2", verifier=verifier, adaptive=False)
    with engine(case) as made:
        together = [completion.tokens for completion in made.run(crowd(), settings)]
    with engine(case, max_rows=1) as made:
        assert [completion.tokens for completion in made.run(crowd(), settings)] == together


def test_the_same_request_again_gets_the_same() -> None:
    prompt = crowd()[-1]
    with engine(Case("model:shape=best-first", adaptive=False)) as made:
        first, second = (made.run([prompt])[0] for _ in range(2))
    assert first.tokens == second.tokens
    assert second.num_cached == len(prompt) - 1


# What others shipped: each must be seen.


def noise_of_the_batch(self: RequestRng, row: int, position: int) -> Any:
    return self.requests.of[row].rng.at(row, position)


def off_by_one_at_a_border(self: BlockTables, row: Any, first: int, last: int) -> Any:
    slots = true_slots(self, row, first, last).copy()
    at_border = slots % self.pool.block_size == 0
    slots[at_border] = (slots[at_border] + 1) % (self.pool.num_blocks * self.pool.block_size)
    return slots


def contiguous(self: BlockTables, row: Any, first: int, last: int) -> Any:
    slots = true_slots(self, row, first, last)
    return (slots[:1] + range(len(slots))) % (self.pool.num_blocks * self.pool.block_size) if len(slots) else slots


def never_moved(self: Any, kept: Any) -> None:
    for row, path in kept:
        row.length += len(path)


true_slots = BlockTables.slots
BROKEN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "noise that hangs on the batch": (RequestRng, "at", noise_of_the_batch),
    "one position off at a page's border": (BlockTables, "slots", off_by_one_at_a_border),
    "slots taken for contiguous": (BlockTables, "slots", contiguous),
    "accepted nodes are not moved": (paged_rows.PagedRows, "keep", never_moved),
    "rows see each other's slots": (
        flat_pass.FlatRow, "seen", lambda self, kind, style: flat_pass.Seen(slice(0, len(self.slots)), None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_the_comparison_sees_a_broken_engine(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[fault])
    with engine(Case("ngram", 16, 40, adaptive=False)) as made:
        assert differing(made, crowd())
