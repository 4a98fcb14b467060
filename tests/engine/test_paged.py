"""Keys and values in pages, over the models of the zoo: scores are those of plain forward passes.

Rows of different lengths open, grow by random paths of random trees, close, and open again behind what is known of
their texts; in one line where the model takes our attention, and side by side. Prompts come in pieces, too.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from zoo import FAMILIES
from zoo_rows import accept, deep_tree, make_row, model_of, random_chain, random_tree

from specdec.engine import flat_pass, paged_rows
from specdec.engine.attention import attention_copy
from specdec.engine.causal_lm import CausalLM
from specdec.engine.masks import MaskStyle
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row
from specdec.paging.pool import BlockPool
from specdec.paging.prefixes import PrefixTree
from specdec.paging.tables import BlockTables
from specdec.tree import TokenTree

CHAINS = ("bloom", "falcon-alibi", "mpt", "gpt_neo-local")
REFUSED = ("t5", "mamba", "jamba", "lfm2", "qwen3_next", "rwkv", "recurrent_gemma")
OWN_ATTENTION = ("gptj", "codegen", "falcon-rotary")  # their code takes no other
NAMES = [name for name in FAMILIES if name not in REFUSED]


@torch.no_grad()
def plain(model: Any, row: Row, tree: TokenTree, node: int) -> torch.Tensor:
    """(V,) logits behind a node, without a cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([row.tokens + tree.path_tokens(node)]), use_cache=False).logits
    return logits[0, -1]


def drive(lm: CausalLM, model: Any, seed: int) -> float:
    """The largest difference from plain passes, at a random node of each row in each step."""
    rng, worst = random.Random(seed), 0.0
    rows = [make_row(rng, i, size) for i, size in enumerate((5, 23, 1))]
    lm.open(rows)
    for step in range(5):
        steps = rows
        if step == 3:  # a prompt in pieces beside the others
            late = make_row(rng, 20, 19)
            lm.open([late])
            lm.queue_prefill(late, 7)
            rows = [*rows, late]
        trees = [
            random_chain(rng, row.tokens[-1], 4)
            if lm.chain_only
            else rng.choice((deep_tree, random_tree))(rng, row.tokens[-1])
            for row in steps
        ]
        scores = lm.score(steps, trees)
        nodes = [rng.randrange(len(tree)) for tree in trees]
        for row, tree, score, node in zip(steps, trees, scores, nodes, strict=True):
            worst = max(worst, float((score.logits[node] - plain(model, row, tree, node)).abs().max()))
        accept(lm, steps, trees, nodes, rng)
        if step == 1:
            again = [
                make_row(rng, 9, 17),
                Row(10, list(rows[1].tokens), 200),
                Row(11, [*rows[1].tokens[:9], 3, 4], 200),
            ]
            lm.close(rows[:2])
            lm.open(again)
            assert lm.num_kept(again[1]) == len(again[1].tokens) - 1
            assert lm.num_kept(again[2]) >= 8
            rows = rows[2:] + again
    lm.close(rows)
    return worst


def paged(model: Any) -> CausalLM:
    pool = BlockPool(300, 4)
    return CausalLM(model, tables=BlockTables(pool, PrefixTree(pool)))


@pytest.mark.parametrize("in_line", [True, False], ids=["in one line", "side by side"])
@pytest.mark.parametrize("name", NAMES)
def test_pages_give_the_scores_of_plain_passes(name: str, in_line: bool) -> None:
    model = model_of(name)
    if in_line:
        if name in CHAINS or name in OWN_ATTENTION:
            with pytest.raises(UnsupportedModelError, match="kept attention"):
                attention_copy(model)
            return
        lm = paged(attention_copy(model))
    else:
        lm = paged(model)
    assert lm._rows.is_flat == in_line  # type: ignore[attr-defined]
    assert drive(lm, model, 3) < max(FAMILIES[name].tolerance, 1e-5)
    assert lm.tables is not None
    assert lm.tables.tree is not None
    lm.tables.tree.clear()
    assert lm.tables.pool.num_held == 0


def window_by_slots(self: Any, kind: str, keys: Any, queries: Any) -> Any:
    return keys > queries + 1 - self.window


def all_of_the_area(self: Any, kind: str, style: Any) -> Any:
    seen = true_seen(self, kind, style)
    return flat_pass.Seen(seen.slots, None)


true_seen = flat_pass.FlatRow.seen
BROKEN: dict[str, tuple[str, type, str, Any]] = {
    "no tree mask": ("llama", flat_pass.FlatRow, "seen", all_of_the_area),
    "positions count siblings": (
        "llama", flat_pass.FlatRow, "positions",
        property(lambda self: self.row_pass.start + torch.arange(len(self.row_pass.new_tokens)).numpy()),
    ),
    "a window one too short": ("mistral-window", MaskStyle, "within", window_by_slots),
    "accepted nodes stay where they were": (
        "llama", paged_rows.PagedRows, "keep",
        lambda self, kept: [setattr(row, "length", row.length + len(path)) for row, path in kept],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_the_comparison_sees_broken_pages(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, attribute, broken = BROKEN[fault]
    lm = paged(attention_copy(model_of(name)))
    monkeypatch.setattr(owner, attribute, broken)
    assert drive(lm, model_of(name), 3) > max(1e-3, 10 * FAMILIES[name].tolerance)
