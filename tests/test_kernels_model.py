"""Whole models on our attention kernel, simulated: the same logits as transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import kernel_cache, simulated  # noqa: F401
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import specdec.cache
from specdec import grouped_attention
from specdec.cache import Move, RaggedCache
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row
from specdec.target import CausalLM
from specdec.tree import TokenTree

pytestmark = pytest.mark.usefixtures("simulated")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "gemma2, window and softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=64, attn_logit_softcapping=2.0)
    ),
    "gpt-oss, window and sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)
    ),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The softcap of each call that reached the kernel."""
    seen: list[float] = []
    original = grouped_attention.tree_attention

    def counted(query: Tensor, *args: Any) -> Tensor:
        seen.append(args[4])
        return original(query, *args)

    monkeypatch.setattr(grouped_attention, "tree_attention", counted)
    return seen


def tree_logits(model: Any) -> list[Tensor]:
    """Two ragged rows: a first pass with the prompts, then one after a commit that moves slots."""
    target = CausalLM(model)
    rows = [Row(0, list(range(3, 20)), 99), Row(1, [5, 6, 7, 8], 99)]
    target.open(rows)
    found: list[Tensor] = []
    trees = [TokenTree((19, 1, 2, 3, 4), (-1, 0, 0, 2, 3)), TokenTree((8, 9, 10), (-1, 0, 0))]
    found += [scores.logits for scores in target.score(rows, trees)]
    target.commit(rows, [(0, 2, 3), (0, 2)])
    for row, tokens in zip(rows, ([2, 3, 30], [10, 31]), strict=True):
        row.tokens += tokens
    trees = [TokenTree((30, 1, 2, 3), (-1, 0, 0, 1)), TokenTree((31, 9, 10, 11, 12, 13), (-1, 0, 1, 2, 3, 0))]
    return found + [scores.logits for scores in target.score(rows, trees)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_passes_take_the_kernel_and_give_the_same_logits(family: str, calls: list[float]) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 1.0)
    model.set_attn_implementation("eager")
    expected = tree_logits(model)
    grouped_attention.use_kernels(model)
    got = tree_logits(model)
    assert len(calls) >= 2 * 2  # layers by passes
    assert set(calls) == {2.0 if "softcap" in family else 0.0}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(64, 64), (64, 128)], ids=["equal layers", "layers that differ"])
def test_slots_are_moved_by_one_launch_where_layers_are_equal(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what copies layer by layer give, for rows that move much, little and nothing."""
    launches: list[int] = []
    commit = specdec.cache.commit_kv
    monkeypatch.setattr(specdec.cache, "commit_kv", lambda *args: (launches.append(1), commit(*args)))
    moves = [Move(2, 7, [0, 1, 4, 9, 11]), Move(0, 30, [0, 3])]
    kept = []
    for mode in ("sim", "torch"):
        monkeypatch.setenv("SPECDEC_KERNELS", mode)
        torch.manual_seed(1)
        cache = RaggedCache(len(sizes))
        cache.reserve_rows(3)
        cache.begin_pass(0, 0, 50, None)
        for layer, size in zip(cache.layers, sizes, strict=True):
            layer.update(torch.randn(3, 2, 50, size), torch.randn(3, 2, 50, size))
        for _ in range(2):
            cache.move_slots(moves)
        cache.make_room(200)  # new buffers: the table of addresses must be new, too
        cache.move_slots([Move(1, 40, [0, 2, 5])])
        kept.append([buffer for pair in cache.pairs if pair for buffer in pair])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert len(launches) == (3 if len(set(sizes)) == 1 else 0)


def test_without_kernels_the_same_attention_runs_in_torch(monkeypatch: pytest.MonkeyPatch, calls: list[float]) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", "auto")
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval()
    expected = tree_logits(model)
    grouped_attention.use_kernels(model)
    for a, b in zip(tree_logits(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not calls


def test_a_model_that_keeps_its_attention_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.set_attn_implementation = lambda name: None
    with pytest.raises(UnsupportedModelError, match="kept attention 'sdpa' instead of 'specdec'"):
        grouped_attention.use_kernels(model)
