"""Packed layers: the same numbers, the caller's model untouched, and a plain model where packing is impossible."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import specdec
from specdec.cpu import accelerate
from specdec.cpu.accelerate import accelerated, accelerated_copy
from specdec.cpu.packed_linear import PackedLinear, packing_fault
from specdec.engine import attention
from specdec.engine.attention import attention_forward
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import Row
from specdec.tree import TokenTree

SIZES = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4}
needs_packing = pytest.mark.skipif(bool(packing_fault(torch.float32)), reason=packing_fault(torch.float32))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, hidden_size=64, intermediate_size=128, num_key_value_heads=2)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4)).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, hidden_size=64, intermediate_size=64, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


@needs_packing
@pytest.mark.parametrize("build", [llama, gpt2, mixtral])
@pytest.mark.parametrize("in_place", [True, False])
def test_an_accelerated_model_scores_trees_as_the_plain_one(build: Any, in_place: bool) -> None:
    """A layer packed with its weight transposed, or without its bias, changes the logits."""
    tree = TokenTree((3, 4, 5, 6, 7), (-1, 0, 0, 1, 2))
    scores = []
    for model in (build(), accelerated(build(), in_place)):
        engine, row = CausalLM(model), Row(0, [9, 8, 3], 20)
        engine.open([row])
        scores.append(engine.score([row], [tree])[0].logits)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)


@needs_packing
def test_the_callers_model_stays_untouched_and_shares_what_is_not_packed() -> None:
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    ours = accelerated(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert ours.model.embed_tokens.weight is model.model.embed_tokens.weight


@needs_packing
def test_generation_with_packed_layers_gives_the_same_tokens() -> None:
    model = llama()
    ids = torch.tensor([[5, 9, 12, 5, 9, 12, 5]])
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)
    assert torch.equal(specdec.generate(model, ids, max_new_tokens=24, do_sample=False, accelerate=True), expected)


def triple(layer: Any) -> None:
    layer.register_forward_hook(lambda _, __, output: output * 3)


def triple_input(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 3,))


def replace_forward(layer: Any) -> None:
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 3


def quantise(layer: Any) -> None:
    """A weight of a class of its own, which says float32 and holds something else."""

    class Quantised(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.nn.functional.linear:
                return function(args[0], args[1].as_subclass(torch.Tensor) * 3)
            return super().__torch_function__(function, types, args, kwargs or {})

    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)


@needs_packing
@pytest.mark.parametrize("change", [triple, triple_input, replace_forward, quantise])
def test_a_linear_layer_that_does_more_than_its_class_stays_as_it_is(change: Any) -> None:
    model, ids = llama(), torch.arange(6)[None]
    for layer in (model.model.layers[1].self_attn.o_proj, model.lm_head):
        change(layer)
    expected = model(ids).logits
    assert not torch.allclose(expected, llama()(ids).logits, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(accelerated(model, in_place=True)(ids).logits, expected, rtol=1e-4, atol=1e-4)


@needs_packing
def test_what_is_accelerated_stays_as_it_is_and_can_be_neither_copied_nor_saved(tmp_path: Path) -> None:
    """A file or a copy without the packed weights would look like a whole one."""
    model = accelerated(llama(), in_place=True)
    assert accelerated(model) is model
    for use in (model.state_dict, lambda: model.save_pretrained(tmp_path), lambda: copy.deepcopy(model)):
        with pytest.raises(TypeError, match="before it is accelerated"):
            use()


@needs_packing
def test_hooks_and_the_mode_of_a_model_reach_its_copy() -> None:
    model, ids = llama(), torch.arange(6)[None]
    first = accelerated_copy(model)
    handle = model.model.layers[1].register_forward_hook(lambda _, __, output: output * 3)
    torch.testing.assert_close(accelerated_copy(model)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    handle.remove()
    torch.testing.assert_close(accelerated_copy(model)(ids).logits, first(ids).logits)
    model.train()
    assert accelerated_copy(model).training
    model.eval()
    assert not accelerated_copy(model).training


@needs_packing
@pytest.mark.parametrize("build", [llama, gpt2, mixtral, lambda: llama().bfloat16()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_an_accelerated_model_does_what_it_does_elsewhere(build: Any, dtype: torch.dtype) -> None:
    """What autocast had rounded met packed weights of another dtype, and oneDNN could not create a primitive."""
    plain, ids = build(), torch.arange(6)[None]
    if packing_fault(plain.dtype):
        pytest.skip(packing_fault(plain.dtype))
    model = accelerated(build(), in_place=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        found, expected = model(ids).logits, plain(ids).logits
        assert found.dtype == expected.dtype == dtype
        assert not CausalLM(model).chain_only
    assert (found - expected).norm() < 0.02 * expected.norm()


@needs_packing
@pytest.mark.parametrize("build", [llama, gpt2])
def test_an_accelerated_model_refuses_to_be_trained(build: Any) -> None:
    """Gradients ended at the packed layers with a warning, so that all weights kept the values that they had."""
    model, ids = accelerated(build(), in_place=True), torch.arange(6)[None]
    loss = torch.nn.functional.cross_entropy(model(ids).logits[0], ids[0])
    with pytest.raises(TypeError, match="packed layers have no gradients; train the model before"):
        loss.backward()


@needs_packing
def test_an_accelerated_model_refuses_another_dtype_and_device() -> None:
    model, ids = accelerated(llama(), in_place=True), torch.arange(6)[None]
    expected = model(ids).logits
    assert torch.equal(model.float().cpu().to(torch.float32)(ids).logits, expected)
    for convert in (lambda: model.to(torch.bfloat16), model.double, lambda: model.to("meta")):
        with pytest.raises(TypeError, match=r"packed layers stay torch\.float32 on the CPU .* load it anew"):
            convert()


@needs_packing
def test_a_copy_is_made_anew_when_the_attention_changes() -> None:
    model = llama()
    assert accelerated_copy(model).config._attn_implementation == attention.NAME
    model.set_attn_implementation("eager")
    assert accelerated_copy(model).config._attn_implementation == "eager"


@needs_packing
def test_threads_get_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each made its own, which takes twice the memory."""
    model, made, both_wait = llama(), [], threading.Barrier(2)

    def make(plain: Any, in_place: bool = False) -> Any:
        made.append(1)
        return accelerated(plain, in_place)

    def ask(_: int) -> Any:
        both_wait.wait()
        return accelerated_copy(model)

    monkeypatch.setattr(accelerate, "accelerated", make)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    assert first is second
    assert made == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_is_let_go_whether_it_was_packed_or_not(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    accelerated_copy(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@needs_packing
def test_a_mask_may_be_written_to_between_passes() -> None:
    """What attention keeps with a mask must not outlive what the mask said."""
    plain, ids = llama(), torch.arange(6)[None]
    ours, mask = accelerated(plain), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    first = ours(ids, attention_mask=mask).logits
    mask[..., 5, :4] = False
    second = ours(ids, attention_mask=mask).logits
    assert not torch.allclose(second, first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, plain(ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-4)


@needs_packing
def test_a_copy_is_made_anew_when_the_weights_change() -> None:
    """Packed weights of an earlier state of a model in training would be wrong without a word."""
    model = llama()
    first = accelerated_copy(model)
    assert accelerated_copy(model) is first
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert accelerated_copy(model) is not first


def test_where_packing_is_impossible_the_model_is_returned_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(accelerate, "packing_fault", lambda _: "not here")
    assert accelerated(model) is model
    assert packing_fault(torch.float64)


@needs_packing
def test_an_accelerated_model_really_attends_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registration that a model ignores would change nothing but the speed."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return attention_forward(*args, **kwargs)

    AttentionInterface.register(attention.NAME, counted)
    try:
        plain = llama()
        engine, row = CausalLM(accelerated(plain)), Row(0, [9, 8, 3], 20)
        calls.clear()
        engine.open([row])
        engine.score([row], [TokenTree((3, 4, 5), (-1, 0, 0))])
    finally:
        AttentionInterface.register(attention.NAME, attention_forward)
    assert len(calls) == SIZES["num_hidden_layers"]
    assert plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [1, 2, 8, 9])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_attention_is_attention_with_repeated_heads(
    dtype: torch.dtype, num_queries: int, masked: bool, groups: int
) -> None:
    if not masked and num_queries > 1:
        num_queries = 0  # the causal mask of a prompt: all slots are queries
    generator = torch.Generator().manual_seed(0)
    batch, heads, slots, size = 3, 6, 21, 16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q = random(batch, heads, num_queries or slots, size)
    k, v = random(batch, groups, slots, size), random(batch, groups, slots, size)
    mask = torch.rand((batch, 1, q.shape[2], slots), generator=generator) > 0.4 if masked else None
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = heads // groups, True  # type: ignore[assignment]
    found, _ = attention_forward(layer, q, k, v, mask, scaling=0.3)
    seen = torch.ones(q.shape[2], slots, dtype=torch.bool).tril(slots - q.shape[2]) if mask is None else mask
    scores = q.float() @ k.repeat_interleave(heads // groups, 1).float().transpose(-1, -2) * 0.3
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = (weights @ v.repeat_interleave(heads // groups, 1).float()).transpose(1, 2)
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
