"""A prefix that is known already must not cost drafts: draft models and heads go on as if they had read it themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from crowd import SEED, Case, crowd, crowd_model, engine
from trained import random_eagle, random_feature_cell

from specdec.drafters import eagle
from specdec.paging.tables import BlockTables
from specdec.serving.engine import Engine
from specdec.serving.request import RequestSettings

CASES = ["ngram", "model:shape=best-first", "model:shape=chain", "eagle", "eagle1", "hybrid:parts=ngram+eagle"]
SETTINGS = RequestSettings(max_new_tokens=16, stop_token_ids=(), temperature=0.5, seed=SEED)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    make = random_feature_cell if "eagle1" in str(request.node.callspec.params.get("drafter")) else random_eagle
    monkeypatch.setattr(eagle, "find", lambda *_: Path("head"))
    monkeypatch.setattr(eagle, "version", lambda _: (str(make),))
    monkeypatch.setattr(eagle, "load_eagle", lambda *_: make(crowd_model()))


def steps(made: Engine, prompt: Sequence[int]) -> list[Any]:
    """The trees and what was accepted of them."""
    found = [
        (delta.step.tree_tokens, delta.step.tree_parents, delta.tokens)
        for delta in made.submit(prompt, SETTINGS)
        if delta.step
    ]
    assert sum(len(tree) > 1 for tree, _, _ in found) > 3 or "ngram" in made.drafter.name
    return found


def drafted(drafter: str, sharing: bool) -> list[Any]:
    """The steps of texts that begin alike, one after the other, and of the first one with its answer and another turn."""
    case = Case(drafter.replace("eagle1", "eagle"), 4, 200, sharing, adaptive=False)
    prompts = crowd()[-4:]
    with engine(case) as made:
        found = [steps(made, prompt) for prompt in (*prompts, prompts[0])]
        turn = [*prompts[0], *(token for _, _, tokens in found[0] for token in tokens), 3, 4, 5]
        found.append(steps(made, turn))
        assert not sharing or made.metrics().cached_tokens >= 4 * 36 + len(turn) - 8
    return found


@pytest.mark.usefixtures("heads")
@pytest.mark.parametrize("drafter", CASES)
def test_drafts_are_the_same_where_a_prefix_is_shared(drafter: str) -> None:
    assert drafted(drafter, True) == drafted(drafter, False)


def all_filled(self: BlockTables, store: Any, row: Any) -> int:
    return self[row].num_cached


def unread(self: BlockTables, row: Any) -> None:
    for filled in self._filled.values():
        filled[self[row].blocks] = self.pool.block_size


@pytest.mark.usefixtures("heads")
@pytest.mark.parametrize(
    ("drafter", "name", "broken"),
    [("model:shape=best-first", "num_filled", all_filled), ("eagle", "note_filled", unread)],
    ids=["drafted from slots that were never filled", "a head's lag is forgotten"],
)
def test_the_comparison_sees_lost_states(drafter: str, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drafted(drafter, False)
    monkeypatch.setattr(BlockTables, name, broken)
    assert drafted(drafter, True) != expected
