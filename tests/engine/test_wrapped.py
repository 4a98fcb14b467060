"""Models inside something else: adapters, compiled modules, and wrappers that hand everything on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from onerow import VOCAB, batch, make_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

import specdec
from specdec.engine.causal_lm import CausalLM
from specdec.errors import UnsupportedModelError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft asks for it
]


def lora(base: Any | None = None, modules: str = "q_proj v_proj") -> Any:
    """A PeftModel whose adapter changes what the model says."""
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=modules.split(), task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(make_model() if base is None else base, config).eval()


class Around(nn.Module):
    """A wrapper of a user's own, without any attribute of the model inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Strict(Around):
    """A wrapper that takes what a plain forward takes, and no positions."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return self.inner(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)


WRAPPERS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "lora on everything": lambda: lora(modules="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"),
    "compiled": lambda: torch.compile(make_model(), backend="eager"),
    "parallel": lambda: nn.DataParallel(make_model()),
    "around": lambda: Around(make_model()),
    "lora inside another": lambda: Around(lora()),
    "compiled lora": lambda: torch.compile(lora(), backend="eager"),
}


@pytest.fixture(scope="module")
def prompts() -> dict[str, Tensor]:
    return batch([5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8, 9], [30])


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_verifies_what_the_model_inside_does(wrapper: str, model: Any, prompts: dict[str, Tensor]) -> None:
    """Guards a forward that takes any keyword, read as one that takes no positions; and drafting with such a model."""
    wrapped = WRAPPERS[wrapper]()
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with torch.compiler.set_stance("force_eager"):  # what is compiled stays wrapped, and is not compiled for each shape
        engine = CausalLM(wrapped)
        assert engine.support.can_tree, engine.support.reason
        for shape in ("chain", "3x2x1", "best-first"):
            out = specdec.generate(
                model, **prompts, drafter=f"model:shape={shape}", draft_model=wrapped, adaptive=False, **settings
            )
            assert torch.equal(out, model.generate(**prompts, **settings))


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("drafter", ["ngram", "recycling", "model:shape=3x2x1", "model"])
def test_an_adapted_model_generates_the_tokens_that_it_generates_itself(
    drafter: str, accelerate: bool, prompts: dict[str, Tensor]
) -> None:
    """The adapter must act in every pass, and the draft model may be the model itself."""
    wrapped = lora()
    settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = wrapped.generate(**prompts, **settings)
    with wrapped.disable_adapter():
        plain = wrapped.generate(**prompts, **settings)
    assert not torch.equal(expected, plain), "the adapter matters"
    out = specdec.generate(
        wrapped, **prompts, drafter=drafter, draft_model=wrapped if "model" in drafter else None, accelerate=accelerate, adaptive=False,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    assert torch.equal(out.sequences, expected)
    if drafter.startswith("model:"):
        assert out.stats.mean_acceptance_length > 2
    inside = wrapped.generate(**prompts, custom_generate=specdec.custom_generate("ngram"), **settings)
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("wrapper", ["around", "parallel", "lora inside another"])
def test_a_wrapper_runs_on_packed_layers_too(wrapper: str, model: Any, prompts: dict[str, Tensor]) -> None:
    wrapped = WRAPPERS[wrapper]()
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    out = specdec.generate(
        model, **prompts, drafter="model:shape=3x2", draft_model=wrapped, accelerate=True, adaptive=False, **settings
    )
    assert torch.equal(out, model.generate(**prompts, **settings))


def test_an_adapter_that_is_switched_off_is_off(prompts: dict[str, Tensor]) -> None:
    """Guards answers that are kept for a model although its adapter has changed."""
    wrapped = lora()
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with_adapter = specdec.generate(wrapped, **prompts, drafter="ngram", **settings)
    with wrapped.disable_adapter():
        without = specdec.generate(wrapped, **prompts, drafter="ngram", **settings)
        assert torch.equal(without, wrapped.generate(**prompts, **settings))
    assert torch.equal(with_adapter, wrapped.generate(**prompts, **settings))
    assert not torch.equal(with_adapter, without)


@pytest.mark.parametrize(
    ("base", "modules", "can_tree"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)), "c_attn", True),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)), "dense", False),
    ],
    ids=["gpt2", "bloom"],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_an_adapter_changes_nothing_of_what_a_family_can_do(
    base: Callable[[], Any], modules: str, can_tree: bool, prompts: dict[str, Tensor]
) -> None:
    """A model that takes no positions must not seem to take them because its wrapper takes anything."""
    wrapped = lora(base().eval(), modules)
    assert CausalLM(wrapped).support.can_tree is can_tree
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = specdec.generate(wrapped, **prompts, drafter="model", draft_model=wrapped, adaptive=False, **settings)
    assert torch.equal(out, wrapped.generate(**prompts, **settings))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_virtual_tokens_are_refused_and_never_left_out(config: Any, model: Any) -> None:
    """Guards another text without a word: generate() hands the model inside over, and the tokens with it are lost."""
    wrapped = get_peft_model(make_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids = torch.tensor([[5, 9, 12, 7]])
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    for call in (
        lambda: CausalLM(wrapped),
        lambda: specdec.generate(wrapped, input_ids=ids, drafter="ngram", **settings),
        lambda: wrapped.generate(input_ids=ids, custom_generate=specdec.custom_generate("ngram"), **settings),
        lambda: specdec.generate(model, ids, drafter="model", draft_model=wrapped, **settings),
    ):
        with pytest.raises(UnsupportedModelError, match="PeftModelForCausalLM cannot be verified"):
            call()


def test_a_wrapper_that_takes_no_positions_reads_chains() -> None:
    support = CausalLM(Strict(make_model())).support
    assert (support.can_tree, support.reason) == (
        False,
        "its forward takes no position_ids, so siblings cannot share a position",
    )


def test_a_forward_that_was_replaced_is_asked_through_its_class() -> None:
    """Guards patches of ``forward`` that take any argument and hand it on."""
    patched = make_model()
    original = patched.forward
    patched.forward = lambda *args, **kwargs: original(*args, **kwargs)
    assert CausalLM(patched).support.can_tree


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "a/path", None], ids=["module", "text", "nothing"])
def test_what_is_no_model_is_refused_in_words(thing: Any, model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="is no transformers model and wraps none"):
        CausalLM(thing)
    if thing is not None:
        with pytest.raises(ValueError, match="draft_model must be a loaded"):
            specdec.generate(model, torch.tensor([[5, 9]]), drafter="model", draft_model=thing, max_new_tokens=2)
