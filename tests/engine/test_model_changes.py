"""Whatever is done to a model between two calls reaches its copies: packed, on our attention, and recorded passes."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from rerun import Rerun
from tape import Tape
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo import randomize

import specdec
from specdec.cpu import accelerate
from specdec.cpu.accelerate import accelerated, accelerated_copy, drop_copy
from specdec.cpu.packed_linear import PackedLinear, packing_fault
from specdec.cuda import graphs
from specdec.cuda.graphs import GraphPool
from specdec.cuda.host_state import host_state
from specdec.engine import weight_watch
from specdec.engine.attention import attention_copy
from specdec.engine.cache import RaggedCache
from specdec.engine.causal_lm import CausalLM
from specdec.engine.model_state import ModelState
from specdec.engine.weight_watch import WeightWatch
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row
from specdec.tree import TokenTree

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),  # a second adapter is what we want
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # asked for by peft
    pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate"),
    pytest.mark.skipif(bool(packing_fault(torch.float32)), reason=packing_fault(torch.float32)),
]

SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = torch.tensor([[5, 9, 12, 5, 9, 12, 5]])
NUM_NEW = 10


@pytest.fixture(autouse=True)
def small_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MIN_CAPACITY", 64)


def build(kind: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **settings})).float().eval()
    randomize(model)
    return model


def steered() -> Any:
    """With modules of a user's own class, which read attributes of their own and of other objects."""
    model = build()
    for layer in model.model.layers:
        layer.mlp = Steered(layer.mlp)
    return model


class Strength:
    def __init__(self, value: float) -> None:
        self.value = value


class Steered(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scaling, self.options, self.strength = 1.0, {"bias": [0.0]}, Strength(1.0)
        self.shift = torch.zeros(128)  # neither a parameter nor a buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scaling * self.strength.value + self.options["bias"][0] + self.shift


def lora(**settings: Any) -> LoraConfig:
    modules = ["q_proj", "v_proj", "o_proj", "up_proj"]
    return LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False, **settings)


def wrapped(**settings: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(build(), lora(**settings), adapter_name="first").eval()
    model.add_adapter("second", lora(**settings))
    return model.eval()


def injected() -> Any:
    torch.manual_seed(1)
    model = build()
    for name in ("first", "second"):
        model.add_adapter(lora(), adapter_name=name)
    model.set_adapter("first")
    return model.eval()


def wide(size: int = 64) -> PeftModel:
    """Adapters that are large enough to be packed themselves."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=size, lora_alpha=4 * size, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False
    )
    return get_peft_model(build(), config, adapter_name="first").eval()


def scaled_by_ia3() -> PeftModel:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(build(), config, adapter_name="first").eval()
    for name, parameter in model.named_parameters():
        if "ia3" in name:
            parameter.data.uniform_(0.2, 3)
    return model


def expected_of(model: Any) -> list[int]:
    return model.generate(IDS, max_new_tokens=NUM_NEW, do_sample=False)[0].tolist()


def through_accelerated(model: Any) -> list[int]:
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "accelerate": True}
    return specdec.generate(model, IDS, **options)[0].tolist()


def through_kernels(model: Any, recorders: Any = None) -> list[int]:
    """As with cuda_graphs, whose copy runs on a CPU too."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    ours = attention_copy(inner)
    engine, row = CausalLM(ours, replays=recorders and GraphPool(ours, recorders)), Row(0, IDS[0].tolist(), 100)
    engine.open([row])
    while len(row.tokens) < IDS.shape[1] + NUM_NEW:
        scores = engine.score([row], [TokenTree((row.tokens[-1], 3, 4), (-1, 0, 0))])
        engine.commit([row], [[0]])
        row.tokens.append(int(scores[0].logits[0].argmax()))
    assert engine.replay is None or (engine.replay.fault == "" and engine.replay.num_replays > 0)
    engine.close([row])
    return row.tokens


def through_recordings(model: Any) -> list[int]:
    return through_kernels(model, Tape)


WAYS = [through_accelerated, through_kernels, through_recordings]
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {}


def change(build: Callable[[], Any] = build) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """One way to change what ``build`` makes."""

    def add(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CHANGES[function.__name__.replace("_", " ")] = (build, function)
        return function

    return add


def middle(model: Any) -> Any:
    return model.model.layers[1]


# --- weights


@change()
def an_operator_in_place(model: Any) -> None:
    with torch.no_grad():
        middle(model).mlp.up_proj.weight.mul_(-2)


@change()
def data_in_place(model: Any) -> None:
    middle(model).self_attn.v_proj.weight.data.mul_(-2)


@change()
def data_copied(model: Any) -> None:
    middle(model).self_attn.o_proj.weight.data.copy_(torch.randn(128, 128))


@change()
def data_replaced(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)


@change()
def data_turned(model: Any) -> None:
    """The same storage, other strides."""
    weight = middle(model).self_attn.o_proj.weight
    weight.data = weight.data.t()


@change()
def numpy_writes(model: Any) -> None:
    middle(model).mlp.down_proj.weight.detach().numpy()[:] *= -3


@change()
def a_row_of_data(model: Any) -> None:
    token = expected_of(model)[-1]
    model.lm_head.weight.data[token] = 0


@change()
def a_column_of_data(model: Any) -> None:
    middle(model).mlp.down_proj.weight.data[:, 77] = 20


@change()
def one_element_in_place(model: Any) -> None:
    with torch.no_grad():
        middle(model).mlp.down_proj.weight[3, 5] = 1000


@change()
def a_vector_of_all_parameters(model: Any) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.5 + 0.02, model.parameters())


@change()
def a_state_loaded(model: Any) -> None:
    model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()})


@change()
def a_state_assigned(model: Any) -> None:
    model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()}, assign=True)


@change()
def a_parameter_replaced(model: Any) -> None:
    middle(model).self_attn.q_proj.weight = nn.Parameter(torch.randn(128, 128))


@change()
def the_embeddings_of_data(model: Any) -> None:
    model.model.embed_tokens.weight.data.mul_(-1)


@change(lambda: build(tie_word_embeddings=True))
def tied_weights(model: Any) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.model.embed_tokens.weight.data[:, :64] *= -1


@change(lambda: build(tie_word_embeddings=True))
def weights_untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


@change(lambda: build(attention_bias=True, mlp_bias=True))
def a_bias_of_data(model: Any) -> None:
    middle(model).mlp.down_proj.bias.data.add_(torch.linspace(-20, 20, 128))


@change(lambda: build(attention_bias=True))
def a_fused_bias_of_data(model: Any) -> None:
    middle(model).self_attn.v_proj.bias.data.add_(torch.linspace(-20, 20, 64))


@change(lambda: build(attention_bias=True))
def a_bias_removed(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias = None


@change()
def an_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.zero_grad()


@change(lambda: build("gpt2", n_embd=128, n_layer=2, n_head=4))
def a_transposed_layer_of_data(model: Any) -> None:
    model.transformer.h[0].mlp.c_proj.weight.data.mul_(-3)


@change(lambda: build("mixtral", hidden_size=128, intermediate_size=64, num_local_experts=4))
def an_expert_of_data(model: Any) -> None:
    middle(model).mlp.experts.down_proj.data.mul_(-30)


# --- attributes that a forward reads


@change()
def the_scale_of_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 3.0


@change()
def the_epsilon_of_norms(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 1000.0


@change()
def the_weight_of_a_norm(model: Any) -> None:
    middle(model).post_attention_layernorm.weight.data[::2] *= -3


@change()
def the_weight_of_a_norm_replaced(model: Any) -> None:
    middle(model).post_attention_layernorm.weight = nn.Parameter(torch.randn(128))


@change()
def the_scale_of_rotations(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


@change()
def frequencies_in_place(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.1)


@change()
def frequencies_replaced(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.1


@change()
def an_activation_replaced(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()


@change(lambda: build("smollm3", no_rope_layers=[1, 1]))
def rotations_left_out(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.use_rope = False


@change(lambda: build("granite"))
def multipliers(model: Any) -> None:
    for layer in model.model.layers:
        layer.residual_multiplier = 0.2


@change(lambda: build("granite", logits_scaling=1.0))
def a_value_of_the_config(model: Any) -> None:
    model.config.logits_scaling = -1.0


@change()
def another_config(model: Any) -> None:
    config = CONFIG_MAPPING["llama"](**SIZES, attn_implementation="eager")
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = config
    middle(model).self_attn.scaling = 2.0


@change(steered)
def an_attribute_of_a_class_of_ones_own(model: Any) -> None:
    middle(model).mlp.scaling = -2.0


@change(steered)
def an_attribute_of_another_object(model: Any) -> None:
    middle(model).mlp.strength.value = -2.0


@change(steered)
def an_entry_of_a_list(model: Any) -> None:
    middle(model).mlp.options["bias"][0] = 5.0


@change(steered)
def a_plain_tensor_replaced(model: Any) -> None:
    middle(model).mlp.shift = torch.linspace(-5, 5, 128)


# --- modules, code and hooks


@change()
def a_module_replaced(model: Any) -> None:
    middle(model).mlp = nn.Identity()


@change()
def a_linear_layer_replaced(model: Any) -> None:
    torch.manual_seed(3)
    model.lm_head = nn.Linear(128, 97)


@change()
def a_layer_wrapped(model: Any) -> None:
    layer = Steered(middle(model).mlp)
    layer.scaling = -2.0
    middle(model).mlp = layer


@change()
def layers_exchanged(model: Any) -> None:
    first, second = model.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp


@change()
def a_quantised_layer(model: Any) -> None:
    class Rounded(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.scale = layer.weight.detach().abs().max() / 3
            self.rounded = (layer.weight.detach() / self.scale).round().to(torch.int8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.rounded.float() * self.scale).t()

    for layer in model.model.layers:
        layer.mlp.down_proj = Rounded(layer.mlp.down_proj)


@change()
def a_forward_of_its_own(model: Any) -> None:
    mlp = middle(model).mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) * -2


@change()
def a_layers_own_forward(model: Any) -> None:
    layer = middle(model)
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: plain(*args, **kwargs) * -2 + torch.linspace(-30, 30, 128)


@change()
def another_class(model: Any) -> None:
    class Tripled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * -3

    middle(model).mlp.down_proj.__class__ = Tripled


@change()
def a_hook_on_a_linear_layer(model: Any) -> None:
    middle(model).mlp.down_proj.register_forward_hook(lambda _, __, output: output * -3)


@change()
def a_hook_before_a_linear_layer(model: Any) -> None:
    middle(model).self_attn.q_proj.register_forward_pre_hook(lambda _, args: (args[0] * -3,))


@change()
def a_hook_on_attention(model: Any) -> None:
    middle(model).self_attn.register_forward_hook(lambda _, __, output: (output[0] * -3, *output[1:]))


@change()
def a_hook_on_a_layer(model: Any) -> None:
    middle(model).register_forward_hook(lambda _, __, output: output + torch.linspace(-30, 30, 128))


@change()
def a_hook_on_the_decoder(model: Any) -> None:
    def negate(_: Any, __: Any, output: Any) -> Any:
        output.last_hidden_state = -output.last_hidden_state
        return output

    model.model.register_forward_hook(negate)


@change()
def a_weight_normalised(model: Any) -> None:
    weight_norm(middle(model).mlp.down_proj)
    middle(model).mlp.down_proj.parametrizations.weight.original0.data.mul_(-3)


@change()
def a_parametrized_weight(model: Any) -> None:
    class Negative(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -2 * weight

    parametrize.register_parametrization(middle(model).mlp.down_proj, "weight", Negative())


@change()
def a_pruned_weight(model: Any) -> None:
    for layer in model.model.layers:
        prune.l1_unstructured(layer.mlp.down_proj, "weight", 0.7)


# --- adapters


@change()
def an_adapter_injected(model: Any) -> None:
    model.add_adapter(lora())


@change(injected)
def another_adapter(model: Any) -> None:
    model.set_adapter("second")


@change(injected)
def adapters_switched_off(model: Any) -> None:
    model.disable_adapters()


@change(injected)
def an_adapter_deleted(model: Any) -> None:
    model.set_adapter("second")
    model.delete_adapter("first")


@change(wrapped)
def another_adapter_of_a_wrapped_model(model: Any) -> None:
    model.set_adapter("second")


@change(wrapped)
def the_scale_of_an_adapter(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["first"] = -3.0


@change(wrapped)
def the_weights_of_an_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B.first" in name:
            parameter.data.mul_(-3)


@change(wide)
def the_weights_of_a_wide_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B.first" in name:
            parameter.data.mul_(-3)


@change(wrapped)
def an_adapter_unloaded(model: Any) -> None:
    model.base_model.unload()


@change(lambda: wrapped(use_dora=True))
def another_adapter_with_magnitudes(model: Any) -> None:
    model.set_adapter("second")


@change(wrapped)
def merged_weights_that_are_then_changed(model: Any) -> None:
    model.merge_adapter()
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data.mul_(-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_gives_the_tokens_of_generate(name: str, way: Callable[[Any], list[int]]) -> None:
    """Copies held old weights, and attributes of their own, and went on with the text of the model as it had been."""
    make, alter = CHANGES[name]
    model = make()
    before = expected_of(model)
    assert way(model) == before
    alter(model)
    expected = expected_of(model)
    assert expected != before, "a change that changes no token shows nothing"
    for _ in range(2):
        assert way(model) == expected
    assert expected_of(model) == expected, "the model itself must stay as it is"


def own_forward(model: Any) -> None:
    plain = model.forward

    def forward(input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        output = plain(input_ids=input_ids, position_ids=position_ids, **kwargs)
        output.logits = -output.logits
        return output

    model.forward = forward


def test_a_model_with_a_forward_of_its_own_runs_as_it_is_and_not_on_another_attention() -> None:
    """That forward goes on to run the model and not a copy, whatever is replaced in the copy."""
    model = build()
    before = through_accelerated(model)
    own_forward(model)
    assert through_accelerated(model) == expected_of(model) != before
    with pytest.raises(UnsupportedModelError, match="given a forward of its own; remove that first"):
        attention_copy(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_decoder_with_a_forward_of_its_own_keeps_the_attention_of_the_model() -> None:
    """Setting the attention of the copy would have set it in the config that this decoder shares with the model."""
    model = build()
    plain = model.model.forward
    model.model.forward = lambda **kwargs: plain(**kwargs)
    expected = expected_of(model)
    assert through_accelerated(model) == expected
    assert isinstance(accelerated_copy(model).lm_head, PackedLinear)
    assert model.config._attn_implementation == "sdpa"
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        attention_copy(model)


@pytest.mark.parametrize("compiled", [lambda mlp: mlp.compile(backend="eager"), None])
def test_a_compiled_part_stays_as_it_is(compiled: Any) -> None:
    model = build()
    mlp = middle(model).mlp
    if compiled:
        compiled(mlp)
    else:
        middle(model).mlp = torch.compile(mlp, backend="eager")
    expected = expected_of(model)
    assert through_accelerated(model) == through_kernels(model) == expected
    assert middle(accelerated_copy(model)).mlp is middle(model).mlp


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [wrapped, lambda: wrapped(use_dora=True), wide, scaled_by_ia3])
def test_adapters_are_switched_merged_and_switched_off(
    make: Callable[[], Any], way: Callable[[Any], list[int]]
) -> None:
    """A merged adapter that is switched off takes its weights back in the midst of the next pass."""
    model = make()
    texts = []

    def check() -> None:
        texts.append(expected_of(model))
        assert way(model) == texts[-1]

    check()
    with model.disable_adapter():
        check()
    check()
    model.merge_adapter()
    check()
    with model.disable_adapter():
        assert way(model) == expected_of(model) == texts[1]
    check()
    assert texts[0] == texts[2] == texts[3] == texts[4] != texts[1]


def test_a_merged_adapter_that_is_switched_off_leaves_the_weights_of_the_model_right() -> None:
    """The copy's pass took its weights back from packed ones that nobody keeps, and noted that they were no longer merged."""
    plain, model = expected_of(build()), wrapped()
    assert through_accelerated(model) == expected_of(model) != plain
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    assert through_accelerated(model) == plain
    assert expected_of(model) == plain


@pytest.mark.parametrize("part", ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"])
def test_every_uncounted_write_to_a_row_or_a_column_is_found(part: str) -> None:
    model = build()
    weight = model.get_submodule(part).weight
    before, watch = weight.detach().clone(), WeightWatch([model.get_submodule(part)])
    for dim, size in enumerate(weight.shape):
        for place in range(size):
            weight.data.select(dim, place).add_(1)
            assert not watch.is_unchanged(), (dim, place)
            weight.data.copy_(before)
            assert watch.is_unchanged()


def test_of_a_large_model_whole_rows_are_found_within_some_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_watch, "_MOST_SAMPLES", 500)
    model = build()
    first = accelerated_copy(model)
    num_parts = watch_of(model).num_parts
    assert num_parts > 4
    assert all(accelerated_copy(model) is first for _ in range(2 * num_parts))
    model.lm_head.weight.data[50] += 1
    assert any(accelerated_copy(model) is not first for _ in range(num_parts))
    second = accelerated_copy(model)
    model.lm_head.weight.data.mul_(1.001)
    assert accelerated_copy(model) is not second


def watch_of(model: Any) -> WeightWatch:
    weights = ModelState.of(model).copies["accelerated"].weights
    assert isinstance(weights, WeightWatch)
    return weights


def quietly(model: Any) -> None:
    """Nothing that a pass could see."""


def with_gradients(model: Any) -> None:
    model(IDS, labels=IDS).loss.backward()
    model.zero_grad()


def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model(IDS)


def frozen(model: Any) -> None:
    model.requires_grad_(False)


def other_mode(model: Any) -> None:
    model.train()
    model.eval()


def hooked_for_a_while(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None).remove()


def with_nan(model: Any) -> None:
    """It does not equal itself."""
    model.model.norm.weight.data[0] = torch.nan


def attribute(model: Any) -> None:
    middle(model).self_attn.scaling = 0.5


@pytest.mark.parametrize(
    "use", [quietly, with_gradients, in_inference_mode, frozen, other_mode, hooked_for_a_while, with_nan, attribute]
)
def test_nothing_is_made_anew_when_nothing_changed_that_a_copy_holds(use: Callable[[Any], None]) -> None:
    model = build()
    model.lm_head.weight.data[3] = torch.nan if use is with_nan else 0.0
    first = accelerated_copy(model), attention_copy(model)
    for _ in range(3):
        use(model)
        assert (accelerated_copy(model), attention_copy(model)) == first
        with torch.inference_mode():
            assert (accelerated_copy(model), attention_copy(model)) == first
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert accelerated_copy(model) is first[0]


def test_a_model_that_was_made_in_inference_mode_is_watched_by_its_contents() -> None:
    """PyTorch counts no writes to such tensors."""
    with torch.inference_mode():
        model = build()
        before = through_accelerated(model)
        first = accelerated_copy(model)
        assert accelerated_copy(model) is first
        middle(model).mlp.up_proj.weight.mul_(-2)
        assert through_accelerated(model) == expected_of(model) != before


def test_a_capture_in_another_thread_changes_no_copy() -> None:
    """Copies share the hooks of their model, and an engine that reads hidden states hangs some on it for each pass."""
    model = build()
    first = accelerated_copy(model)
    found: list[Any] = []
    asking = lambda *_: found.append(accelerated_copy(model))  # noqa: E731
    middle(model).mlp.register_forward_pre_hook(lambda *_: None).remove()
    engine = CausalLM(first, capture_hidden=True, feature_layers=(0, 1))
    row = Row(0, [5, 9], 20)
    engine.open([row])
    with engine._capture:
        asking()
    assert found == [first]
    assert host_state(model) == (before := host_state(model))
    with engine._capture:
        assert host_state(model) == before


def test_the_old_copy_is_let_go_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three copies of the weights were in memory while the third was made."""
    model = build()
    old = weakref.ref(accelerated_copy(model))
    alive: list[Any] = []

    def make(plain: Any) -> Any:
        alive.append(old())
        return accelerated(plain)

    monkeypatch.setattr(accelerate, "accelerated", make)
    gc.disable()
    try:
        model.lm_head.weight.data.mul_(2)
        accelerated_copy(model)
    finally:
        gc.enable()
    assert alive == [None]


def test_a_copy_may_be_dropped() -> None:
    """The way out where single elements were written past PyTorch's count."""
    model = build()
    old = weakref.ref(accelerated_copy(model))
    gc.disable()
    try:
        drop_copy(model)
        assert old() is None
    finally:
        gc.enable()
    drop_copy(model)
    assert through_accelerated(model) == expected_of(model)


def test_weights_that_were_assigned_anew_do_not_keep_the_old_ones() -> None:
    model = build()
    accelerated_copy(model)
    old = weakref.ref(middle(model).mlp.up_proj.weight)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    gc.collect()
    assert old() is None


def test_a_model_moved_to_another_dtype_and_back_is_packed_anew() -> None:
    model = build()
    expected = through_accelerated(model)
    first = accelerated_copy(model)
    model.double()
    assert accelerated_copy(model) is model
    assert through_accelerated(model) == expected_of(model)
    model.float()
    assert accelerated_copy(model) not in (first, model)
    assert through_accelerated(model) == expected


def hooked_by_its_owner(model: Any) -> None:
    model.model.register_forward_hook(lambda *_, model=model: None)


def known_to_a_part(model: Any) -> None:
    middle(model).owner = [model]


@pytest.mark.parametrize("alter", [hooked_by_its_owner, known_to_a_part])
@pytest.mark.parametrize("make", [accelerated_copy, attention_copy])
def test_a_model_that_its_own_parts_know_is_let_go_with_its_copy(make: Any, alter: Callable[[Any], None]) -> None:
    """A copy shares hooks and attributes, and through them it held the model for as long as the process lived."""
    model = build()
    alter(model)
    gone = weakref.ref(model), weakref.ref(make(model))
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("make", [accelerated_copy, attention_copy])
def test_a_copy_goes_with_its_model_without_a_collection(make: Any) -> None:
    model = build()
    gone = weakref.ref(model), weakref.ref(make(model))
    gc.disable()
    try:
        del model
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_duplicate_of_a_model_has_a_copy_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    model = build()
    first = accelerated_copy(model)
    other = duplicate(model)
    other.lm_head = nn.Linear(128, 97, bias=False)
    if duplicate is copy.copy:
        model.lm_head = nn.Linear(128, 97, bias=False)  # a shallow copy shares its modules
    assert accelerated_copy(other) is not first
    assert through_accelerated(other) == expected_of(other)
    assert through_accelerated(model) == expected_of(model)


def in_place_scaling(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 3.0


def in_place_epsilon(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 1000.0


def in_place_norm(model: Any) -> None:
    middle(model).post_attention_layernorm.weight = nn.Parameter(torch.linspace(-3, 3, 128))


def in_place_act(model: Any) -> None:
    middle(model).mlp.act_fn.forward = torch.tanh


@pytest.mark.parametrize("alter", [in_place_scaling, in_place_epsilon, in_place_norm, in_place_act])
def test_a_model_that_was_accelerated_in_place_reads_its_attributes_too(alter: Callable[[Any], None]) -> None:
    """A fused layer held the epsilon and the weight of its norms as they had been."""
    plain, ours = build(), accelerated(build(), in_place=True)
    before = ours(IDS).logits
    for model in (plain, ours):
        alter(model)
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ours(IDS).logits, before, rtol=1e-2, atol=1e-2)


def test_an_activation_is_called_and_never_replaced_by_what_it_equals() -> None:
    """One with a parameter equals SiLU until that is set."""

    class Swish(nn.Module):
        beta = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    model = build()
    for layer in model.model.layers:
        layer.mlp.act_fn = Swish()
    assert through_accelerated(model) == expected_of(model)
    for layer in model.model.layers:
        layer.mlp.act_fn.beta = -3.0
    assert through_accelerated(model) == expected_of(model)


def test_a_norm_whose_code_reads_more_stays_as_it_is() -> None:
    """With a gain of 1 it equals the fused one to the last bit."""

    class Gained(type(build().model.norm)):  # type: ignore[misc]
        gain = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    model = build()
    for layer in model.model.layers:
        layer.input_layernorm.__class__ = Gained
    assert through_accelerated(model) == expected_of(model)
    middle(model).input_layernorm.gain = -3.0
    assert through_accelerated(model) == expected_of(model)


def test_a_copy_of_a_copy_is_a_model_of_its_own() -> None:
    model = build()
    ours = attention_copy(model)
    other = copy.deepcopy(ours)
    assert type(other) is type(model)
    assert other.config._attn_implementation == ours.config._attn_implementation != "sdpa"
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert model.lm_head.weight.any()
    assert torch.equal(ours(IDS).logits, attention_copy(model)(IDS).logits)


def test_threads_never_take_the_same_recordings_or_find_them_gone() -> None:
    """Two threads saw that something was there, and one of them took it from an empty list."""
    both_have_looked = threading.Barrier(2)

    class Awaited(list[Any]):
        def __len__(self) -> int:
            size = super().__len__()
            if size:
                with suppress(threading.BrokenBarrierError):
                    both_have_looked.wait(0.3)  # only one can look at a time
            return size

    model = attention_copy(build())
    style = CausalLM(model).support.style
    assert style is not None
    state, pool = ModelState.of(model), GraphPool(model, Rerun)
    left = pool.borrow(style, lambda: RaggedCache(2))
    state.idle_replays = Awaited()
    pool.give_back(*left)
    with ThreadPoolExecutor(2) as threads:
        lent = list(threads.map(lambda _: pool.borrow(style, lambda: RaggedCache(2)), range(2)))
    assert sorted(passes is left[1] for _, passes in lent) == [False, True]


def test_recordings_are_kept_while_nothing_changes() -> None:
    model = build()
    for _ in range(2):
        through_recordings(model)
    ((_, passes),) = ModelState.of(attention_copy(model)).idle_replays
    recorded = passes.num_recordings
    through_recordings(model)
    assert [passes.num_recordings for _, passes in ModelState.of(attention_copy(model)).idle_replays] == [recorded]
