"""The end of a model's positions: specdec.generate takes and gives what model.generate does, and refuses what that crashes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from zoo import FAMILIES, Family

import specdec
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import Step

LAST = 24  # positions
# Prompt and new tokens around the end: texts that end well before it, at it, one behind it, and further.
LENGTHS = [(4, 20), (4, 21), (LAST - 1, 1), (LAST - 1, 2), (LAST, 1), (20, 5)]
BEYOND = [(4, 22), (LAST - 1, 3), (LAST, 2), (LAST + 1, 1), (LAST + 3, 6)]
DRAFTERS = ["none", "ngram:min_prob=0.0,min_gain=0.0", "recycling:min_prob=0.0,min_gain=0.0,start=None,capacity=64"]

_SIZES = {"max_position_embeddings": LAST}
_NEO = {"attention_types": [[["global"], 4]], "num_layers": 4}
_ROPE = {"rope_theta": 10000.0, "factor": 2.0}
TABLES: dict[str, Any] = {
    "gpt2": FAMILIES["gpt2"],
    "opt": FAMILIES["opt"],
    "gptj": FAMILIES["gptj"],
    "codegen": FAMILIES["codegen"],
    "gpt_neo-local": FAMILIES["gpt_neo-local"],
    "gpt_neo-global": Family("gpt_neo-global", "gpt_neo", _NEO, "eager"),
    "gpt_bigcode": Family("gpt_bigcode", "gpt_bigcode"),
    "mpt": Family("mpt", "mpt", {"max_seq_len": LAST}, "eager"),
    "biogpt": Family("biogpt", "biogpt", {"intermediate_size": 48}),
}
ENDLESS: dict[str, Any] = {
    "llama": FAMILIES["llama"],
    "gpt_neox": FAMILIES["gpt_neox"],
    "xglm": Family("xglm", "xglm", {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 4}, "eager"),
    "linear rope": Family("linear", "llama", {"rope_parameters": {"rope_type": "linear", **_ROPE}}),
    "yarn": Family(
        "yarn",
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": LAST // 2, **_ROPE}},
    ),
}
CHANGING: dict[str, Any] = {
    "dynamic rope": Family("dynamic", "llama", {"rope_parameters": {"rope_type": "dynamic", **_ROPE}}),
    "longrope": Family(
        "longrope",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": LAST,
                **_ROPE,
            }
        },
    ),
}
ALL = TABLES | ENDLESS | CHANGING


def built(name: str) -> Any:
    # The limit of LongRoPE is its original length.
    model = ALL[name].build(**({"max_position_embeddings": 4 * LAST} if name == "longrope" else _SIZES))
    model.generation_config.pad_token_id = 0
    model.generation_config.use_cache = True  # not so by default in MPT
    return model.float()


@pytest.fixture(autouse=True)
def _without_reminders() -> Any:
    """transformers reminds of the length that was passed."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def prompt(length: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3 + i % 3 for i in range(length)]])  # it repeats itself: drafts are long
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_equal(model: Any, length: int, num_new: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": num_new, "do_sample": False}
    expected = model.generate(**prompt(length), **options)
    for drafter in DRAFTERS:
        found = specdec.generate(model, **prompt(length), **options, drafter=drafter, max_nodes=40, adaptive=False)
        assert torch.equal(found, expected), drafter


@pytest.mark.parametrize("name", ALL)
def test_texts_up_to_the_last_position_are_generates(name: str) -> None:
    """The last token of a text is never read, so that it needs no position: one token was refused too early."""
    model = built(name)
    for length, num_new in LENGTHS:
        check_equal(model, length, num_new)


@pytest.mark.parametrize("name", ENDLESS)
def test_models_without_an_end_run_past_it_as_in_generate(name: str) -> None:
    """A prompt longer than max_position_embeddings was refused, where generate() only reminds of it."""
    model = built(name)
    for length, num_new in BEYOND:
        check_equal(model, length, num_new)


@pytest.mark.parametrize("name", TABLES)
def test_what_generate_crashes_on_is_refused_in_words(name: str) -> None:
    model = built(name)
    for length, num_new in BEYOND:
        options: dict[str, Any] = {"max_new_tokens": num_new, "do_sample": False}
        with pytest.raises((IndexError, RuntimeError)):
            model.generate(**prompt(length), **options)
        advice = f"at most {LAST + 1 - length} new tokens" if length <= LAST else f"to {LAST} or fewer"
        with pytest.raises(ValueError, match=f"need {max(length, length + num_new - 1)} positions.* {LAST};.*{advice}"):
            specdec.generate(model, **prompt(length), **options)


@pytest.mark.parametrize("name", CHANGING)
def test_frequencies_that_would_change_under_the_cache_are_refused(name: str) -> None:
    model = built(name)
    for length, num_new in BEYOND:
        with pytest.raises(ValueError, match="rotary embedding changes all frequencies beyond position 24; shorten"):
            specdec.generate(model, **prompt(length), max_new_tokens=num_new, do_sample=False)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo-global", "biogpt"])
def test_rows_of_different_lengths_reach_the_end_together(name: str) -> None:
    """Padding and the widest tree of a batch must not push a row's positions, or a stored mask's slots, past the end."""
    model = built(name)
    ids = torch.tensor([[0] * 12 + [3, 4] * 4, [3 + i % 3 for i in range(20)]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    steps: list[Step] = []
    options: dict[str, Any] = {"max_new_tokens": LAST + 1 - 20, "do_sample": False}
    expected = model.generate(**inputs, **options)
    found = specdec.generate(
        model, **inputs, **options, drafter=DRAFTERS[1], max_nodes=40, adaptive=False, on_step=steps.append
    )
    assert torch.equal(found, expected)
    assert max(step.num_drafted for step in steps) > 2


def test_a_stored_mask_of_slots_is_used_for_chains_only() -> None:
    """Sixteen nodes stand in sixteen slots, and GPT-Neo's mask ends at the last position: it crashed before the text did."""
    engine = CausalLM(built("gpt_neo-global"))
    assert engine.chain_only
    assert "slots" in engine.support.reason
