"""Fused decoder layers: the same numbers as the layers they stand for, and only for layers that are of the known kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from specdec.cpu.accelerate import accelerated
from specdec.cpu.fused_layer import FusedLayer, Rotation, norm_of
from specdec.cpu.fusing import fuse
from specdec.cpu.known_layers import names_of
from specdec.cpu.packed_linear import PackedLinear, PackedSlice, packing_fault
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import Row
from specdec.tree import TokenTree

pytestmark = pytest.mark.skipif(bool(packing_fault(torch.float32)), reason=packing_fault(torch.float32))
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(bool(packing_fault(dtype)), reason=packing_fault(dtype)))
    for dtype in (torch.float32, torch.bfloat16)
]

LAYERS = 3
SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
}
FUSED = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"]
OTHERS = ["gemma2", "olmo2", "granite", "cohere", "gpt_neox", "phi", "mixtral"]


def build(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not all 0 or all 1
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def num_fused(model: Any) -> int:
    return sum(isinstance(module.forward, FusedLayer) for module in model.modules())


def score(model: Any) -> list[torch.Tensor]:
    """Logits of two ragged steps: trees, then the tokens behind what was kept."""
    engine = CausalLM(model)
    rows = [Row(0, [9, 8, 3], 40), Row(1, list(range(5, 17)), 40)]
    trees = [TokenTree((3, 4, 5, 6, 7), (-1, 0, 0, 1, 2)), TokenTree((16, 4, 5), (-1, 0, 0))]
    engine.open(rows)
    first = [s.logits for s in engine.score(rows, trees)]
    engine.commit(rows, [[0, 2, 4], [0, 1]])
    for row, tokens in zip(rows, ([5, 7, 11], [4, 2]), strict=True):
        row.tokens.extend(tokens)
    second = [s.logits for s in engine.score(rows, [TokenTree.root(row.tokens[-1]) for row in rows])]
    engine.close(rows[1:])
    alone = engine.score(rows[:1], [TokenTree((11, 1, 2), (-1, 0, 0))])[0].logits
    return [*first, *second, alone]


@pytest.mark.parametrize("kind", [*FUSED, *OTHERS])
def test_an_accelerated_model_of_each_family_scores_as_the_plain_one(kind: str) -> None:
    plain = build(kind)
    ours = accelerated(plain)
    assert num_fused(ours) == (LAYERS if kind in FUSED else 0)
    assert num_fused(plain) == 0
    for found, expected in zip(score(ours), score(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_in_16_bits_it_is_as_near_to_the_truth_as_the_plain_model(kind: str) -> None:
    truth = score(build(kind))
    rounded = build(kind, torch.bfloat16)
    for found, plain, true in zip(score(accelerated(rounded)), score(rounded), truth, strict=True):
        error, usual = (found.float() - true).norm(), (plain.float() - true).norm()
        assert error < 1.5 * usual


def test_windows_reach_the_fused_layers() -> None:
    """A window narrower than the text changes the logits; a fused layer must not lose it."""
    plain = build("mistral", sliding_window=4)
    assert num_fused(accelerated(plain)) == LAYERS
    wide = score(build("mistral", sliding_window=None))
    for found, expected, other in zip(score(accelerated(plain)), score(plain), wide, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, other, rtol=1e-4, atol=1e-4)


def massive(model: Any) -> Any:
    """A thousand times as large in one channel as in all others, as many trained models are."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[0].mul_(3000)
    return model


def quiet(model: Any) -> Any:
    """Layers that add little to what passes through them, as deep ones do."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.05)
            layer.self_attn.o_proj.weight.mul_(0.05)
    return model


@pytest.mark.parametrize("change", [lambda model: model, massive, quiet])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_gives_other_numbers_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, change: Callable[[Any], Any]
) -> None:
    """The trial pass must see a missing half of the rotation, and put the plain layers back."""
    plain, broken, right = (change(build("llama", dtype)) for _ in range(3))
    assert fuse(right) == LAYERS
    monkeypatch.setattr(Rotation, "__call__", lambda _, x, cos, sin: x * cos.unsqueeze(1))
    assert fuse(broken) == 0
    assert not any(isinstance(module, PackedLinear | PackedSlice) for module in broken.modules())
    ids = torch.arange(6)[None]
    assert torch.equal(broken(ids).logits, plain(ids).logits)


def test_a_layer_of_other_shapes_below_the_known_names_stays_as_it_is() -> None:
    """Norms over all heads at once, say: our code may even fail on such a layer."""
    model = build("qwen3")
    for layer in model.model.layers[1:]:
        layer.self_attn.q_norm, layer.self_attn.k_norm = torch.nn.LayerNorm((4, 32)), torch.nn.LayerNorm((2, 32))
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    assert fuse(model) == 1
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_threads_may_share_rotations() -> None:
    """Another thread's pass, with other positions, comes between the two products of a rotation."""
    rotation, x = Rotation(), torch.randn(1, 2, 3, 8)
    cos, sin, other_cos, other_sin = torch.randn(4, 1, 3, 8)

    class Interrupted(torch.Tensor):
        def __mul__(self, other: Any) -> Any:
            rotation(x, other_cos, other_sin)
            return self.as_subclass(torch.Tensor) * other

    expected = Rotation()(x, cos, sin)
    assert torch.equal(rotation(x.as_subclass(Interrupted), cos, sin), expected)


def become_foreign(layer: Any) -> None:
    """Of a class whose code calls something unknown."""

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return self.original(hidden_states, **kwargs)

    layer.__class__ = type("Other", (type(layer),), {"forward": forward, "original": type(layer).forward})


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: setattr(layer.self_attn, "forward", layer.self_attn.forward),
        lambda layer: layer.self_attn.add_module("extra", torch.nn.Identity()),
        lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Sequential(layer.mlp.up_proj)),
        become_foreign,
    ],
)
def test_a_layer_that_does_more_than_is_known_stays_as_it_is(change: Callable[[Any], Any]) -> None:
    model = build("llama")
    change(model.model.layers[1])
    assert fuse(model) == LAYERS - 1
    assert not isinstance(model.model.layers[1].forward, FusedLayer)


def test_names_keywords_and_strings_of_a_forward_are_seen() -> None:
    """An unknown keyword (a softcap, say) may do nothing in a small trial pass, so the name alone must refuse it."""

    class Layer(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            """What it says here does not matter."""
            later = lambda y: y.scaled  # noqa: E731
            return later(self.attend(x, softcap=getattr(self.config, "cap")))  # noqa: B009

    assert {"attend", "softcap", "getattr", "config", "cap", "scaled"} <= names_of(Layer())
    assert not any("What it says" in name for name in names_of(Layer()))


def test_in_place_each_weight_is_held_once() -> None:
    model = accelerated(build("llama"), in_place=True)
    names = [name for name, _ in model.named_parameters()]
    assert not any("proj" in name for name in names)
    layer = model.model.layers[0]
    assert layer.self_attn.k_proj.whole is layer.self_attn.q_proj.whole
    plain = build("llama").model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(getattr(layer.self_attn, name).weight, getattr(plain.self_attn, name).weight)
    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(layer.mlp.up_proj(x), plain.mlp.up_proj(x), rtol=1e-5, atol=1e-5)


def test_a_norm_is_replaced_only_by_its_equal() -> None:
    llama, gemma = build("llama").model.norm, build("gemma").model.norm
    assert norm_of(gemma) is gemma
    x = torch.randn(2, 3, 128)
    assert norm_of(llama) is not llama
    assert torch.equal(norm_of(llama)(x), llama(x))


@pytest.mark.parametrize("error", [ValueError, AttributeError, StopIteration])
def test_a_model_that_cannot_be_tried_is_only_packed(error: type[Exception]) -> None:
    model = build("llama")

    def forward(**_: Any) -> Any:
        raise error("needs more")

    model.forward = forward
    assert fuse(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_runs_where_gradients_are_on(dtype: torch.dtype) -> None:
    model, ids = accelerated(build("llama", dtype)), torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits
    # With gradients on, PyTorch may attend by another kernel, which rounds otherwise.
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 0)


PARTS = [
    "self_attn",
    "mlp",
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "mlp.act_fn",
]


@pytest.mark.parametrize("name", PARTS)
def test_hooks_on_parts_of_a_fused_layer_run_and_leave_it_fused_when_they_go(name: str) -> None:
    """Fused layers call none of these modules: what a user hung on them later never ran."""
    plain, ours, ids = build("llama"), accelerated(build("llama"), in_place=True), torch.arange(6)[None]
    fused = ours(ids).logits
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "ours": []}
    handles, logits = [], []
    for key, model in (("plain", plain), ("ours", ours)):

        def halve(_: Any, __: Any, output: Any, key: str = key) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            seen[key].append(whole)
            return (whole / 2, *output[1:]) if isinstance(output, tuple) else whole / 2

        part = model.model.layers[1].get_submodule(name)
        handles += [part.register_forward_hook(halve), part.register_forward_pre_hook(lambda *_: None)]
        logits.append(model(ids).logits)
    assert [len(outputs) for outputs in seen.values()] == [1, 1]
    torch.testing.assert_close(seen["ours"][0], seen["plain"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[1], fused, rtol=1e-3, atol=1e-3)
    for handle in handles:
        handle.remove()
    assert torch.equal(ours(ids).logits, fused)


def test_hooks_on_every_module_see_the_parts_of_fused_layers() -> None:
    ours, calls = accelerated(build("llama")), []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: calls.append(module))
    try:
        ours(torch.arange(6)[None])
    finally:
        handle.remove()
    assert all(layer.mlp.up_proj in calls for layer in ours.model.layers)


def own_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) / 2


def replaced(model: Any) -> None:
    model.model.layers[1].mlp = torch.nn.Identity()


@pytest.mark.parametrize("change", [own_forward, replaced])
def test_what_was_put_into_a_fused_layer_later_runs(change: Callable[[Any], Any]) -> None:
    plain, ours, ids = build("llama"), accelerated(build("llama"), in_place=True), torch.arange(6)[None]
    before = ours(ids).logits
    for model in (plain, ours):
        change(model)
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_a_fused_layer_in_training_mode_drops_what_the_plain_one_drops() -> None:
    model, ids = accelerated(build("llama", attention_dropout=0.5), in_place=True), torch.arange(6)[None]
    assert num_fused(model) == LAYERS
    still = model(ids).logits
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, still)


@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_autocast_leaves_fused_layers_as_they_are(dtype: torch.dtype, other: torch.dtype) -> None:
    if packing_fault(dtype):
        pytest.skip(packing_fault(dtype))
    model, ids = accelerated(build("llama", dtype)), torch.arange(6)[None]
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        with torch.autocast("cpu", dtype=other):
            assert torch.equal(model.model(ids).last_hidden_state, expected)


def test_a_model_may_be_accelerated_under_autocast() -> None:
    """Rounding hid that fused layers equal their originals, and what a trial said there was kept for the process."""
    packing_fault.cache_clear()
    with torch.autocast("cpu", dtype=torch.float16):
        assert num_fused(accelerated(build("llama"))) == LAYERS


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_fused_model_may_change_its_attention(attention: str) -> None:
    """Fused layers looked for eager attention where transformers does not keep it: KeyError: 'eager'."""
    plain, ours = build("llama"), accelerated(build("llama"), in_place=True)
    ours.set_attn_implementation(attention)
    for found, expected in zip(score(ours), score(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
