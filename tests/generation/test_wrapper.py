"""generate() replaced by ours: token-equal to transformers in float32, option by option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tinyllama import VOCAB, Collector, tiny
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

import specdec
from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.interfaces import Step

DRAFTERS = ["none", "ngram", "model"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny(0)


@pytest.fixture(scope="module")
def draft_model() -> LlamaForCausalLM:
    return tiny(0, layers=1)


@pytest.fixture
def prompts() -> dict[str, Tensor]:
    """Three left-padded prompts; the second repeats itself, so that prompt lookup drafts."""
    rows = [[5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8, 9], [30]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def ours(model: Any, drafter: str, draft_model: Any, **kwargs: Any) -> Any:
    return specdec.generate(model, drafter=drafter, draft_model=draft_model if drafter == "model" else None, **kwargs)


class Never(LogitsProcessor):  # type: ignore[misc]
    """A user's own processor, which depends on the path and writes in place."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % VOCAB] = -float("inf")
        return scores


class AfterToken(StoppingCriteria):  # type: ignore[misc]
    """A user's own criterion: stop where the newest token is a multiple of seven."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] % 7 == 0


GREEDY: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 9},
    {"min_new_tokens": 12},
    {"min_length": 14},
    {"suppress_tokens": [3, 4, 5], "begin_suppress_tokens": [6]},
    {"bad_words_ids": [[11], [12, 13], [9, 10]]},
    {"eos_token_id": [2, 17, 40, 41, 42]},
    {"eos_token_id": None},
    {"forced_eos_token_id": 2},
    {"exponential_decay_length_penalty": (4, 1.5)},
    {"sequence_bias": [[[7], -5.0], [[20, 21], 3.0]]},
    {"logits_processor": LogitsProcessorList([Never()])},
    {"stopping_criteria": StoppingCriteriaList([AfterToken()])},
    {"generation_config": GenerationConfig(max_new_tokens=11, pad_token_id=0, eos_token_id=2, do_sample=False)},
    {"max_length": 15, "max_new_tokens": None},
    {"remove_invalid_values": True, "renormalize_logits": True},
]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("options", GREEDY, ids=lambda o: "+".join(o) or "plain")
def test_greedy_tokens_equal_generate(
    model: Any, draft_model: Any, prompts: dict[str, Tensor], drafter: str, options: dict[str, Any]
) -> None:
    """Guards history shown to processors (padding, path), per-token stopping, and eos handling."""
    settings: dict[str, Any] = {"max_new_tokens": 24, **options}
    if settings["max_new_tokens"] is None:
        del settings["max_new_tokens"]
    if "generation_config" in settings:
        del settings["max_new_tokens"]
    else:
        settings["do_sample"] = False
    expected = model.generate(**prompts, **settings)
    assert torch.equal(ours(model, drafter, draft_model, **prompts, **settings), expected)


@pytest.mark.parametrize("batch", range(1, 9))
def test_batches_of_every_size_equal_generate(model: Any, draft_model: Any, batch: int) -> None:
    """Rows of different lengths, acceptance and ends share passes without touching each other."""
    generator = torch.Generator().manual_seed(batch)
    width = 9
    lengths = torch.randint(1, width + 1, (batch,), generator=generator).tolist()
    ids = torch.randint(3, VOCAB, (batch, width), generator=generator)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ids = ids.masked_fill(mask == 0, 0)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for drafter in DRAFTERS:
        assert torch.equal(
            ours(model, drafter, draft_model, inputs=ids, attention_mask=mask, max_new_tokens=20, do_sample=False),
            expected,
        )


SAMPLING: list[dict[str, Any]] = [
    {"top_k": 0},
    {"temperature": 0.6},
    {"top_k": 5, "top_p": 0.8},
    {"min_p": 0.1, "top_k": 0},
    {"typical_p": 0.7, "repetition_penalty": 1.3},
    {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "top_k": 0},
]


@pytest.mark.parametrize("options", SAMPLING, ids=lambda o: "+".join(o))
def test_sampling_with_match_is_plain_decoding_with_the_same_seed(
    model: Any, draft_model: Any, prompts: dict[str, Tensor], options: dict[str, Any]
) -> None:
    """The claim of position-keyed noise: drafter and batch change nothing but the speed."""
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "seed": 11, **options}
    plain = ours(model, "none", None, **prompts, **settings)
    for drafter in ("ngram", "model"):
        assert torch.equal(ours(model, drafter, draft_model, **prompts, **settings), plain)
    other = ours(model, "none", None, **prompts, **{**settings, "seed": 12})
    assert not torch.equal(other, plain)


def test_without_a_seed_torchs_generator_governs(model: Any, prompts: dict[str, Tensor]) -> None:
    """torch.manual_seed must reproduce a run, as with generate()."""
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(specdec.generate(model, **prompts, max_new_tokens=16, do_sample=True))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_coupled_draft_model_that_is_the_target_is_always_right(model: Any, prompts: dict[str, Tensor]) -> None:
    """Shared noise: the same model drafts exactly what the target samples."""
    out = specdec.generate(
        model, **prompts, drafter="model:num_tokens=4,min_confidence=0.0", draft_model=model, do_sample=True,
        max_new_tokens=21, seed=5, return_dict_in_generate=True, eos_token_id=None, adaptive=False,
    )  # fmt: skip
    assert out.stats.mean_acceptance_length > 4


def test_num_return_sequences_gives_independent_samples(model: Any) -> None:
    ids = torch.tensor([[5, 9, 12]])
    out = specdec.generate(
        model, ids, num_return_sequences=4, do_sample=True, max_new_tokens=12, seed=0, eos_token_id=None
    )
    assert out.shape == (4, 15)
    assert len({tuple(row.tolist()) for row in out}) == 4


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_return_dict_holds_scores_logits_and_statistics(model: Any, draft_model: Any, drafter: str) -> None:
    ids = torch.tensor([[8, 9, 10, 8, 9, 10, 8, 9]])
    settings: dict[str, Any] = {
        "max_new_tokens": 14, "do_sample": False, "repetition_penalty": 1.1, "return_dict_in_generate": True,
        "output_scores": True, "output_logits": True, "eos_token_id": None,
    }  # fmt: skip
    expected = model.generate(ids, **settings)
    got = ours(model, drafter, draft_model, inputs=ids, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    assert got.stats.num_tokens == 14
    assert got.stats.num_accepted_tokens + got.stats.num_drafts == 14
    for mine, theirs in ((got.scores, expected.scores), (got.logits, expected.logits)):
        assert len(mine) == len(theirs) == 14
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_streamer_sees_what_generate_would_show_it(
    model: Any, draft_model: Any, prompts: dict[str, Tensor], drafter: str
) -> None:
    """transformers drops the streamer on the way to custom_generate; blocks must come token by token."""
    single = {"input_ids": prompts["input_ids"][1:2]}
    for inputs in (single, prompts):
        expected, got = Collector(), Collector()
        model.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=expected)
        ours(model, drafter, draft_model, **inputs, max_new_tokens=12, do_sample=False, streamer=got)
        assert (got.parts, got.ended) == (expected.parts, 1)


def test_custom_generate_plugs_into_generate(model: Any, prompts: dict[str, Tensor]) -> None:
    expected = model.generate(**prompts, max_new_tokens=12, do_sample=False)
    got = model.generate(
        **prompts, max_new_tokens=12, do_sample=False, custom_generate=specdec.custom_generate("ngram")
    )
    assert torch.equal(got, expected)


def test_on_step_sees_every_emitted_token(model: Any, prompts: dict[str, Tensor]) -> None:
    steps: list[Step] = []
    out = specdec.generate(
        model, **prompts, max_new_tokens=12, do_sample=False, on_step=steps.append, eos_token_id=None
    )
    for row in range(3):
        emitted = [token for step in steps if step.row == row for token in step.tokens]
        assert emitted == out[row, prompts["input_ids"].shape[1] :].tolist()


def test_the_model_is_left_as_it_was(model: Any, prompts: dict[str, Tensor]) -> None:
    """No hooks, no attributes, no changed config may stay on the user's model."""
    before = (set(vars(model)), model.config.to_dict(), model.generation_config.to_dict())
    specdec.generate(model, **prompts, max_new_tokens=8, do_sample=False)
    assert (set(vars(model)), model.config.to_dict(), model.generation_config.to_dict()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "num_beams"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    ({"cache_implementation": "static"}, "cache_implementation"),
    ({"use_cache": False}, "use_cache"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ({"guidance_scale": 1.5}, "ClassifierFreeGuidance"),
    ({"assistant_model": "x"}, "draft_model"),
]


@pytest.mark.parametrize(("options", "name"), REFUSED, ids=[name for _, name in REFUSED])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_supported_is_refused_by_name(model: Any, options: dict[str, Any], name: str) -> None:
    """An option that is silently ignored gives wrong text without a word."""
    with pytest.raises(UnsupportedOptionError, match=name):
        specdec.generate(model, torch.tensor([[5, 9]]), max_new_tokens=4, do_sample=False, **options)


def test_encoder_decoders_are_refused_by_name() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        specdec.generate(t5, torch.tensor([[5, 9]]), max_new_tokens=4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"inputs": torch.zeros((1, 0), dtype=torch.long)}, "at least one token"),
    ({"inputs": torch.tensor([[5, VOCAB]])}, "vocabulary"),
    ({"inputs": torch.tensor([[5, -1]])}, "vocabulary"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": -3}, "max_new_tokens"),
    ({"drafter": "nonesuch"}, "nonesuch.*ngram"),
    ({"drafter": "ngram:max_order"}, "option=value"),
    ({"drafter": "ngram:nonsense=3"}, "max_order"),
    ({"drafter": "model"}, "draft_model"),
    ({"verifier": "nonesuch"}, "nonesuch.*match"),
    ({"max_nodes": -1}, "max_nodes"),
    ({"seed": -1}, "seed"),
    ({"stop_strings": ["x"]}, "tokenizer"),
    ({"attention_mask": torch.tensor([[1, 0, 1]]), "inputs": torch.tensor([[5, 9, 9]])}, "left"),
    ({"attention_mask": torch.tensor([[0, 0]])}, "every token"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_input_gets_a_clear_error(model: Any, options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"inputs": torch.tensor([[5, 9]]), "max_new_tokens": 4, "do_sample": False, **options}
    with pytest.raises(ValueError, match=message):
        specdec.generate(model, **settings)


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_numbers_are_an_error_not_an_end_of_text(do_sample: bool) -> None:
    broken = tiny(1)
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        specdec.generate(broken, torch.tensor([[5, 9]]), max_new_tokens=4, do_sample=do_sample)


def test_a_draft_model_of_another_vocabulary_is_refused(model: Any) -> None:
    torch.manual_seed(0)
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match=r"99.*61"):
        specdec.generate(model, torch.tensor([[5, 9]]), drafter="model", draft_model=other, max_new_tokens=4)


@pytest.mark.parametrize("vocab", [VOCAB - 1, VOCAB + 1])
@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_a_draft_model_may_differ_from_the_target_in_padding(
    model: Any, vocab: int, verifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models of one family pad their vocabularies differently; a token that the draft model lacks must not crash it."""
    from specdec.drafters import model as model_drafter

    monkeypatch.setattr(model_drafter, "_PADDING", 0.05)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    other = LlamaForCausalLM(config).eval()
    ids = torch.tensor([[5, 9, 3], [VOCAB - 1, 7, 8]])  # the second holds an id that the smaller vocabulary lacks
    mask = torch.ones_like(ids)
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 16}
    for shape in ("chain", "2x2"):
        out = specdec.generate(
            model,
            ids,
            drafter=f"model:shape={shape}",
            draft_model=other,
            do_sample=False,
            verifier=verifier,
            **settings,
        )
        assert torch.equal(out, model.generate(ids, do_sample=False, **settings))
        specdec.generate(
            model, ids, drafter=f"model:shape={shape}", draft_model=other, do_sample=True, verifier=verifier, **settings
        )


@pytest.mark.parametrize("verifier", ["match", "rejection", "traversal"])
@pytest.mark.parametrize("shape", ["chain", "best-first", "3x2x1"])
def test_trees_of_one_and_of_several_draft_models_equal_generate(
    model: Any, draft_model: Any, prompts: dict[str, Tensor], shape: str, verifier: str
) -> None:
    """SpecInfer's trees and their merging change nothing under greedy decoding."""
    expected = model.generate(**prompts, max_new_tokens=20, do_sample=False)
    for drafts in (draft_model, [draft_model, tiny(3, layers=1)]):
        out = specdec.generate(
            model,
            **prompts,
            drafter=f"model:shape={shape}",
            draft_model=drafts,
            verifier=verifier,
            max_new_tokens=20,
            do_sample=False,
        )
        assert torch.equal(out, expected)


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    tokenizer = specdec.load_tokenizer("smollm2-135m")
    tokenizer.padding_side = "left"
    return specdec.load_model("smollm2-135m", dtype="float32", device="cpu"), tokenizer


@pytest.mark.model
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.15}, {"stop_strings": ["three", "sea"]}], ids=str)
def test_the_real_model_gives_the_same_text(real: tuple[Any, Any], options: dict[str, Any]) -> None:
    """Float32, a left-padded batch, stop strings that end inside an accepted block."""
    model, tokenizer = real
    asked = ["Repeat exactly: one, two, three, one, two, three", "Write two lines about the sea.", "Count from 1 to 9."]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": a}], add_generation_prompt=True, tokenize=False)
        for a in asked
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 32, "do_sample": False, **options}
    if "stop_strings" in options:
        settings["tokenizer"] = tokenizer
    expected = model.generate(**inputs, **settings)
    assert torch.equal(specdec.generate(model, **inputs, **settings), expected)


@pytest.mark.model
def test_text_and_iterator_streamers_work_on_the_real_model(real: tuple[Any, Any]) -> None:
    from transformers import TextIteratorStreamer

    model, tokenizer = real
    inputs = tokenizer("Repeat: a b c a b c a b c", return_tensors="pt")
    texts = []
    for run in (model.generate, lambda **k: specdec.generate(model, **k)):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        run(**inputs, max_new_tokens=16, do_sample=False, streamer=streamer)
        texts.append("".join(streamer))
    assert texts[0] == texts[1]
