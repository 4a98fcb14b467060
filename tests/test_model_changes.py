"""Whatever is done to a model between two calls reaches its copies: packed, on our attention, and recorded passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tape import Tape
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo import randomize

import specdec
from specdec import accelerate, captured
from specdec.accelerate import accelerated, accelerated_copy, drop_copy
from specdec.captured import kernel_copy
from specdec.interfaces import Row
from specdec.packed_linear import PackedLinear, packing_fault
from specdec.recording import Rerun
from specdec.target import CausalLM
from specdec.tree import TokenTree

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
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
NUM_NEW = 16


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (accelerate, captured):
        monkeypatch.setattr(module, "_COPIES", type(module._COPIES)())
    monkeypatch.setattr(captured, "_IDLE", type(captured._IDLE)())
    monkeypatch.setattr(captured, "_MIN_CAPACITY", 64)


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
        out = self.inner(x) * self.scaling * self.strength.value + self.options["bias"][0] + self.shift
        return out  # type: ignore[no-any-return]


def lora(**settings: Any) -> LoraConfig:
    modules = ["q_proj", "v_proj", "o_proj", "up_proj"]
    return LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False, **settings)


def wrapped(**settings: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(build(), lora(**settings), adapter_name="a").eval()
    model.add_adapter("b", lora(**settings))
    return model.eval()


def injected() -> Any:
    torch.manual_seed(1)
    model = build()
    for name in "ab":
        model.add_adapter(lora(), adapter_name=name)
    model.set_adapter("a")
    return model.eval()


def wide(size: int = 64) -> PeftModel:
    """Adapters that are large enough to be packed themselves."""
    torch.manual_seed(1)
    config = LoraConfig(r=size, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(build(), config, adapter_name="a").eval()


def scaled_by_ia3() -> PeftModel:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(build(), config, adapter_name="a").eval()
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
    engine, row = CausalLM(kernel_copy(inner), recorders=recorders), Row(0, IDS[0].tolist(), 100)
    engine.open([row])
    while len(row.tokens) < IDS.shape[1] + NUM_NEW:
        scores = engine.score([row], [TokenTree((row.tokens[-1], 3, 4), (-1, 0, 0))])
        engine.commit([row], [[0]])
        row.tokens.append(int(scores[0].logits[0].argmax()))
    assert engine.captured is None or (engine.captured.fault == "" and engine.captured.num_replays > 0)
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


@change(
    lambda: build("mixtral", hidden_size=128, intermediate_size=64, num_local_experts=4)
)
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
def the_models_own_forward(model: Any) -> None:
    plain = model.forward

    def forward(input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        output = plain(input_ids=input_ids, position_ids=position_ids, **kwargs)
        output.logits = -output.logits
        return output

    model.forward = forward


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
    model.set_adapter("b")


@change(injected)
def adapters_switched_off(model: Any) -> None:
    model.disable_adapters()


@change(injected)
def an_adapter_deleted(model: Any) -> None:
    model.set_adapter("b")
    model.delete_adapter("a")


@change(wrapped)
def another_adapter_of_a_wrapped_model(model: Any) -> None:
    model.set_adapter("b")


@change(wrapped)
def the_scale_of_an_adapter(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["a"] = -3.0


@change(wrapped)
def the_weights_of_an_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B.a" in name:
            parameter.data.mul_(-3)


@change(wide)
def the_weights_of_a_wide_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B.a" in name:
            parameter.data.mul_(-3)


@change(wrapped)
def an_adapter_unloaded(model: Any) -> None:
    model.base_model.unload()


@change(lambda: wrapped(use_dora=True))
def another_adapter_with_magnitudes(model: Any) -> None:
    model.set_adapter("b")


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
