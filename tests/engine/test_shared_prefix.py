"""Rows that begin with the same slots read them once, and get what each gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo_rows import deep_tree, model_of, random_tree

from specdec.engine import flat_pass, shared_prefix
from specdec.engine.attention import attention_copy
from specdec.engine.causal_lm import CausalLM
from specdec.engine.shared_prefix import SharedAttention, Sharing, find_sharing
from specdec.interfaces import Row
from specdec.paging.pool import BlockPool
from specdec.paging.prefixes import PrefixTree
from specdec.paging.tables import BlockTables
from specdec.tree import TokenTree

FAMILIES = [
    "llama",
    "qwen3_moe",
    "gpt2",
    "mistral-window",
    "gemma3",
    "gemma2",
    "gpt_oss",
]  # windows and caps do without


@torch.no_grad()
def error(family: str) -> tuple[float, int]:
    """The largest difference from plain passes where rows share 40 tokens, two groups of them; and groups read at once."""
    model, rng = model_of(family), random.Random(5)
    pool = BlockPool(400, 4)
    lm = CausalLM(attention_copy(model), tables=BlockTables(pool, PrefixTree(pool)))
    beginnings = [[rng.randrange(2, 97) for _ in range(40)] for _ in range(2)]
    for i, beginning in enumerate(beginnings):
        row = Row(i, [*beginning, 5], 100)
        lm.open([row])
        lm.score([row], [TokenTree.root(5)])
        lm.commit([row], [[0]])
        row.tokens.append(6)
        lm.close([row])
    texts = [beginnings[i % 2][: 40 - i] + [rng.randrange(2, 97) for _ in range(1 + 3 * i)] for i in range(5)]
    rows = [Row(10 + i, text, 150) for i, text in enumerate([*texts, [7, 8, 9]])]
    lm.open(rows)
    worst = 0.0
    calls = []
    true_call = SharedAttention.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedAttention, "__call__", lambda self, *args: (calls.append(self), true_call(self, *args))[1])
        for make in (deep_tree, random_tree, lambda rng, root: TokenTree.root(root)):
            trees = [make(rng, row.tokens[-1]) for row in rows]
            for row, tree, score in zip(rows, trees, lm.score(rows, trees), strict=True):
                for node in range(len(tree)):
                    ids = torch.tensor([row.tokens + tree.path_tokens(node)])
                    plain = model(input_ids=ids, use_cache=False).logits[0, -1]
                    worst = max(worst, float((score.logits[node] - plain).abs().max()))
            lm.commit(rows, [[0]] * len(rows))
            for row in rows:
                row.tokens.append(rng.randrange(2, 97))
    return worst, len(set(map(id, calls)))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_SHARED", 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_share_slots_get_what_each_gets_alone(family: str) -> None:
    worst, num_groups = error(family)
    assert worst < 1e-5
    assert num_groups == (0 if family in ("mistral-window", "gemma2", "gpt_oss") else 6)  # two a pass


def swapped(self: SharedAttention, query: Any, shared: Any, own: Any, scaling: Any) -> Any:
    return true_call(self, query, shared, own[::-1], scaling)


def unweighted(*args: Any) -> Any:
    out, lse = true_attend(*args)
    return out, torch.zeros_like(lse)


def longer(*args: Any) -> list[Sharing]:
    return [Sharing(each.rows, each.length + 1) for each in true_find(*args)]


true_call, true_attend, true_find = SharedAttention.__call__, shared_prefix._attend, find_sharing
BROKEN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "rows get each other's rest": (SharedAttention, "__call__", swapped),
    "parts are averaged": (shared_prefix, "_attend", unweighted),
    "one slot too many is shared": (flat_pass, "find_sharing", longer),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_comparison_sees_broken_merges(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "can_share", lambda query: True)
    monkeypatch.setattr(*BROKEN[fault])
    try:
        worst, _ = error("llama")
    except RuntimeError:
        return
    assert worst > 1e-3
