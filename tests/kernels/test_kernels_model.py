"""Whole models on our attention kernel, simulated: the same logits as transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import kernel_cache, simulated  # noqa: F401
from kernel_models import FAMILIES, SIZES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import specdec.engine.cache
from specdec.engine import attention
from specdec.engine.cache import Move, RaggedCache
from specdec.engine.causal_lm import CausalLM
from specdec.engine.masks import TreePass
from specdec.engine.paged_rows import PagedRows
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row
from specdec.kernels.attention import TreeMask, pack_mask, visible_slots
from specdec.paging.pool import BlockPool
from specdec.paging.tables import BlockTables
from specdec.tree import TokenTree

pytestmark = pytest.mark.usefixtures("simulated")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The softcap of each call that reached the kernel."""
    seen: list[float] = []
    original = attention.tree_attention

    def counted(query: Tensor, *args: Any) -> Tensor:
        seen.append(args[4])
        return original(query, *args)

    monkeypatch.setattr(attention, "tree_attention", counted)
    return seen


def tree_logits(model: Any, *, in_pages: bool = False) -> list[Tensor]:
    """Two ragged rows: a first pass with the prompts, then one after a commit that moves slots."""
    target = CausalLM(model, tables=BlockTables(BlockPool(20, 4)) if in_pages else None)
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
    attention.use_kernels(model)
    got = tree_logits(model)
    assert len(calls) >= 2 * 2  # layers by passes
    assert set(calls) == {2.0 if "softcap" in family else 0.0}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_reads_rows_from_their_pages(
    family: str, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation("eager")
    expected = tree_logits(model)
    attention.use_kernels(model)
    tables: list[Tensor] = []
    original = PagedRows._pages
    monkeypatch.setattr(PagedRows, "_pages", lambda *args: tables.append(original(*args)) or tables[-1])  # type: ignore[func-returns-value]
    got = tree_logits(model, in_pages=True)
    assert len(calls) >= 2 * 2
    assert max(each.shape[1] for each in tables) >= 5
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(PagedRows, "_pages", lambda *args: original(*args).flip(0))
    wrong = tree_logits(model, in_pages=True)
    assert any((a - b).abs().max() > 1e-2 for a, b in zip(wrong, expected, strict=True))


def lacking_model(case: str) -> Any:
    """A model for whose heads there is no kernel."""
    sizes = SIZES | {"head_dim": 48}
    if case == "window":
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=7))
    if case == "softcap":
        return Gemma2ForCausalLM(
            Gemma2Config(**sizes, sliding_window=5, query_pre_attn_scalar=48, attn_logit_softcapping=2.0)
        )
    if case == "sinks":
        return GptOssForCausalLM(GptOssConfig(**sizes, sliding_window=5, num_local_experts=2, num_experts_per_tok=1))
    if case == "keys unlike values":
        return DeepseekV3ForCausalLM(
            DeepseekV3Config(
                vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=32,
                qk_nope_head_dim=32, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
                max_position_embeddings=512,
            )
        )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(SIZES if case == "float64" else sizes)))


@pytest.mark.parametrize("case", ["head size", "window", "softcap", "sinks", "float64", "keys unlike values"])
def test_heads_without_a_kernel_take_transformers_own_attention(case: str, calls: list[float]) -> None:
    """They took the kernel's twin, which copies the cache in float32, or ended in an error where sizes differ."""
    torch.manual_seed(0)
    model = lacking_model(case).eval().to(torch.float64 if case == "float64" else torch.float32)
    model.set_attn_implementation("eager")
    expected = tree_logits(model)
    attention.use_kernels(model)
    for in_pages in (False, True):
        for a, b in zip(tree_logits(model, in_pages=in_pages), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not calls


class Outputs(TorchDispatchMode):
    """The dtypes of all tensors of at least ``size`` numbers that operators return."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.dtypes = size, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.dtypes |= {t.dtype for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel() >= self.size}
        return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "value_size"), [(48, 48), (112, 112), (64, 32), (192, 128)])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_heads_without_a_kernel_make_no_float32_copy_of_the_cache(
    dtype: torch.dtype, size: int, value_size: int, num_queries: int, calls: list[float]
) -> None:
    slots, module = 600, torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    query = torch.randn(1, 4, num_queries, size).to(dtype)
    key, value = torch.randn(1, 2, slots, size).to(dtype), torch.randn(1, 2, slots, value_size).to(dtype)
    seen = torch.ones(1, num_queries, num_queries, dtype=torch.bool).tril()
    depths = torch.arange(num_queries, dtype=torch.int32)[None]
    kept = torch.tensor([slots - num_queries], dtype=torch.int32)
    tree = TreeMask(kept, pack_mask(seen), num_queries, depths, depths)
    mask = visible_slots(tree, slots)[:, None]
    mask.tree_pass = TreePass(tree, torch.zeros(1, 1, dtype=torch.int32), 0)  # type: ignore[attr-defined]
    with Outputs(min(key.numel(), value.numel())) as outputs:
        got, _ = attention.attention_forward(module, query, key, value, mask, scaling=size**-0.5)
    assert not calls
    if size == value_size:
        assert outputs.dtypes <= {dtype}
    else:  # PyTorch itself computes these in float32 on a CPU
        with Outputs(outputs.size) as theirs:
            sdpa_attention_forward(module, query, key, value, mask, scaling=size**-0.5)
        assert outputs.dtypes <= theirs.dtypes
    exact = sdpa_attention_forward(module, query.double(), key.double(), value.double(), mask, scaling=size**-0.5)[0]
    torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("sizes", [(64, 64), (64, 128)], ids=["equal layers", "layers that differ"])
def test_slots_are_moved_by_one_launch_where_layers_are_equal(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what copies layer by layer give, for rows that move much, little and nothing."""
    launches: list[int] = []
    commit = specdec.engine.cache.commit_kv
    monkeypatch.setattr(specdec.engine.cache, "commit_kv", lambda *args: (launches.append(1), commit(*args)))
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
    attention.use_kernels(model)
    for in_pages in (False, True):
        for a, b in zip(tree_logits(model, in_pages=in_pages), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not calls


def test_a_model_that_keeps_its_attention_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.set_attn_implementation = lambda name: None
    with pytest.raises(UnsupportedModelError, match="kept attention 'sdpa' instead of 'specdec'"):
        attention.use_kernels(model)
