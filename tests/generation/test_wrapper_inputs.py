"""What generate() is handed: as in model.generate, or refused in a sentence that says the rule, the value and a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tinyllama import VOCAB, Collector, tiny
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    BatchEncoding,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import specdec
from specdec.distributions import ProcessorTransform
from specdec.drafters.none import NoDrafter
from specdec.errors import UnsupportedModelError, UnsupportedOptionError
from specdec.generation.options import fast_policy, sampling_params
from specdec.interfaces import Row
from specdec.rng import PhiloxRng
from specdec.tree import TokenTree
from specdec.verifiers import make_verifier

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, about options that are at odds

IDS = torch.tensor([[8, 9, 10, 8, 9, 10, 8, 9]])
TWO = torch.tensor([[0, 0, 0, 5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8]])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny(0)


def settings(**changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": 8, "do_sample": False, **changes}


# --- as generate() takes it


def test_what_model_generate_takes_by_position_is_taken_by_position(model: Any) -> None:
    """The second place was the keyword-only part: a config given there was a TypeError."""
    config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    given = (LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.4)]), [MaxLengthCriteria(13)], None, False)
    for count in range(len(given) + 1):
        expected = model.generate(IDS, config, *given[:count])
        assert torch.equal(specdec.generate(model, IDS, config, *given[:count]), expected)
    shown = Collector()
    specdec.generate(model, IDS, config, *given, None, shown)
    assert shown.ended == 1
    assert [token for part in shown.parts for token in part] == expected[0].tolist()


SAME: dict[str, dict[str, Any]] = {
    "the default cache by its name": {"cache_implementation": "dynamic"},
    "a cache that is used": {"use_cache": True},
    "an option by its old name for the default cache": {"cache_implementation": "hybrid"},
    "a mask of booleans": {"attention_mask": TWO != 0},
    "a mask of floats": {"attention_mask": (TWO != 0).double()},
    "32 bits": {"inputs": TWO.int()},
    "positions that are counted": {"position_ids": torch.tensor([[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])},
    "no lists": {"logits_processor": None, "stopping_criteria": None},
    "a tuple of criteria": {"stopping_criteria": (MaxLengthCriteria(11),)},
    "plain functions": {"stopping_criteria": [lambda ids, scores, **_: ids[:, -1] % 5 == 0]},
    "a negative prompt without guidance": {"negative_prompt_ids": TWO},
    "not synchronised": {"synced_gpus": False},
    "a broken number of tokens": {"max_new_tokens": 5.5},
    "an infinite number of tokens": {"max_new_tokens": float("inf"), "eos_token_id": [3, 14, 29, 10, 57]},
    "no time": {"max_time": 0.0},
    "a maximum beside more new tokens": {"max_length": 9, "max_new_tokens": 4},
    "a maximum alone": {"max_length": 12, "max_new_tokens": None},
    "a criterion in the place of max_new_tokens": {"stopping_criteria": [MaxLengthCriteria(20)]},
    "a criterion that was met by the prompt": {"stopping_criteria": [MaxLengthCriteria(3)]},
    "the smaller of two criteria": {"stopping_criteria": [MaxLengthCriteria(14), MaxLengthCriteria(10)]},
    "an end token in a list": {"eos_token_id": [57]},
    "end tokens in a tensor": {"eos_token_id": torch.tensor([57, 29])},
    "an end token in a tensor of no dimension": {"eos_token_id": torch.tensor(57)},
    "an end token in a criterion": {"stopping_criteria": [EosTokenCriteria(torch.tensor(57))]},
    "no end token": {"eos_token_id": None},
    "no padding token": {"pad_token_id": None, "eos_token_id": 57},
    "more tokens than the end allows": {"min_new_tokens": 6, "eos_token_id": 57},
    "a minimum above the maximum": {"min_new_tokens": 12, "eos_token_id": 57},
    "a config with all of it": {
        "generation_config": GenerationConfig(max_new_tokens=7, eos_token_id=57, repetition_penalty=1.3)
    },
    "chunks of the prompt": {"prefill_chunk_size": 3},
    "do_sample unset": {"do_sample": None},
}


@pytest.mark.parametrize("drafter", ["none", "ngram"])
@pytest.mark.parametrize("options", SAME.values(), ids=list(SAME))
def test_it_means_what_it_means_to_generate(model: Any, options: dict[str, Any], drafter: str) -> None:
    given = {"inputs": TWO, "attention_mask": (TWO != 0).long(), **settings(**options)}
    if "generation_config" in given:
        given = {key: value for key, value in given.items() if key not in ("max_new_tokens", "do_sample")}
    expected = model.generate(**given)
    assert torch.equal(specdec.generate(model, drafter=drafter, adaptive=False, **given), expected)


def test_an_empty_cache_of_the_default_kind_is_taken(model: Any) -> None:
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        out = specdec.generate(model, IDS, past_key_values=cache, **settings())
        assert torch.equal(out, model.generate(IDS, **settings()))


def test_without_a_prompt_it_begins_with_the_first_token_of_all(model: Any) -> None:
    assert torch.equal(specdec.generate(model, **settings()), model.generate(**settings()))


def test_the_result_says_that_it_has_no_cache(model: Any) -> None:
    out = specdec.generate(model, IDS, return_dict_in_generate=True, **settings())
    assert out.past_key_values is None
    assert "past_key_values" in (specdec.generate.__doc__ or "")


SEEDS = [7, np.int64(7), np.uint8(7), torch.tensor(7), torch.tensor([7])]


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: type(seed).__name__)
def test_a_seed_is_any_kind_of_whole_number(model: Any, seed: Any) -> None:
    given = settings(do_sample=True, eos_token_id=None)
    assert torch.equal(specdec.generate(model, IDS, seed=seed, **given), specdec.generate(model, IDS, seed=7, **given))


def test_a_tree_has_any_kind_of_whole_number_of_nodes(model: Any) -> None:
    for number in (0, np.int32(3), torch.tensor(3)):
        out = specdec.generate(model, IDS, max_nodes=number, **settings())
        assert torch.equal(out, model.generate(IDS, **settings()))


def test_drafters_and_verifiers_may_be_objects(model: Any) -> None:
    out = specdec.generate(model, IDS, drafter=NoDrafter(), verifier=make_verifier("match"), **settings())
    assert torch.equal(out, model.generate(IDS, **settings()))


# --- refused

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("a list of ids", {"inputs": [[5, 9]]}, r"inputs must be a tensor .* list: use torch.tensor"),
    ("an array", {"inputs": np.array([[5, 9]])}, "inputs must be a tensor .* ndarray"),
    ("a dict", {"inputs": {"input_ids": IDS}}, r"inputs must be a tensor .* dict: .*\*\*inputs"),
    ("an encoding", {"inputs": BatchEncoding({"input_ids": IDS})}, r"BatchEncoding: .*\*\*inputs"),
    ("text", {"inputs": "once upon a time"}, "inputs must be a tensor .* str"),
    ("a list by keyword", {"inputs": None, "input_ids": [[5]]}, "input_ids must be a tensor .* list"),
    ("one row", {"inputs": IDS[0]}, r"\(batch, length\) .* \(8,\); a single prompt is inputs\[None\]"),
    ("three dimensions", {"inputs": IDS[None]}, r"\(batch, length\) .* \(1, 1, 8\)"),
    ("no rows", {"inputs": IDS[:0]}, r"at least one token, got shape \(0, 8\)"),
    ("no tokens", {"inputs": IDS[:, :0]}, r"at least one token, got shape \(1, 0\)"),
    ("broken ids", {"inputs": IDS.float()}, "whole numbers, got torch.float32"),
    ("ids of one bit", {"inputs": IDS > 8}, "whole numbers, got torch.bool"),
    ("a wider mask", {"attention_mask": torch.ones(1, 9)}, r"shape of the token ids, \(1, 8\), got \(1, 9\)"),
    ("a wider mask with padding", {"attention_mask": torch.arange(9)[None].clamp(max=1)}, r"got \(1, 9\)"),
    ("a narrower mask", {"attention_mask": torch.ones(1, 3, dtype=torch.long)}, r"got \(1, 3\)"),
    ("a narrower mask with padding", {"attention_mask": torch.tensor([[0, 1, 1]])}, r"got \(1, 3\)"),
    ("a mask of one dimension", {"attention_mask": torch.ones(8)}, r"got \(8,\)"),
    ("a mask of four", {"attention_mask": torch.ones(1, 1, 8, 8)}, r"got \(1, 1, 8, 8\)"),
    ("a mask of more rows", {"attention_mask": torch.ones(2, 8)}, r"got \(2, 8\)"),
    ("a list as mask", {"attention_mask": [[1] * 8]}, "attention_mask must be a tensor .* list"),
    ("a mask of other numbers", {"attention_mask": 2 * torch.ones(1, 8)}, "1 for tokens and 0 for padding, .* 2.0"),
    ("a mask to add", {"attention_mask": -1e9 * torch.ones(1, 8)}, "1 for tokens and 0 for padding"),
    ("a NaN in the mask", {"attention_mask": torch.full((1, 8), float("nan"))}, "1 for tokens and 0 for padding"),
    ("embeddings alone", {"inputs": None, "inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
    ("embeddings beside ids", {"inputs_embeds": torch.zeros(1, 8, 32)}, "inputs_embeds"),
    ("labels", {"labels": IDS}, "not supported: labels"),
    ("other positions", {"position_ids": torch.arange(3, 11)[None]}, "position_ids are counted"),
    ("fewer positions", {"position_ids": torch.arange(4)[None]}, r"position_ids .* \(1, 4\)"),
    ("a config as dict", {"generation_config": {"max_new_tokens": 3}}, "generation_config must be a GenerationConfig"),
    ("a model's config", {"generation_config": tiny(0).config}, "must be a GenerationConfig, .* LlamaConfig"),
    ("a single criterion", {"stopping_criteria": MaxLengthCriteria(3)}, "stopping_criteria must be a list.* into a list"),
    ("a single processor", {"logits_processor": TemperatureLogitsWarper(0.5)}, "logits_processor must be a list"),
    ("no criterion", {"stopping_criteria": ["stop"]}, "stopping_criteria must hold functions .* 'stop'"),
    ("no processor", {"logits_processor": [0.5]}, "logits_processor must hold functions .* 0.5"),
    ("a full cache", {"past_key_values": "full"}, "hold tokens"),
    ("a static cache", {"past_key_values": StaticCache(tiny(0).config, max_cache_len=30)}, "StaticCache"),
    ("a tuple as cache", {"past_key_values": ()}, "past_key_values must be a Cache .* tuple"),
    ("a list as cache", {"past_key_values": []}, "past_key_values must be a Cache .* list"),
    ("pages", {"cache_implementation": "paged"}, "cache_implementation='paged'"),
    ("a quantised cache", {"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    ("another loop", {"custom_generate": print}, "custom_generate cannot be given"),
    ("synchronised", {"synced_gpus": True}, "synced_gpus"),
    ("another tokenizer", {"assistant_tokenizer": object()}, "assistant_tokenizer"),
    ("a greedy pair", {"num_return_sequences": 2}, "num_return_sequences"),
    ("a streamer without end", {"streamer": print}, "streamer must have the methods put and end"),
    ("no whole trees", {"max_nodes": None}, "max_nodes must be a whole number, got None"),
    ("broken trees", {"max_nodes": 4.0}, "max_nodes must be a whole number, got 4.0"),
    ("true trees", {"max_nodes": True}, "max_nodes must be a whole number, got True"),
    ("text for trees", {"max_nodes": "8"}, "max_nodes must be a whole number, got '8'"),
    ("negative trees", {"max_nodes": -3}, "max_nodes must be 0 or more, got -3"),
    ("a list of seeds", {"seed": [1, 2]}, r"seed must be a whole number, got \[1, 2\]"),
    ("a broken seed", {"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ("a true seed", {"seed": True}, "seed must be a whole number, got True"),
    ("a broken seed of NumPy", {"seed": np.float64(3)}, "seed must be a whole number"),
    ("a seed of one bit", {"seed": torch.tensor(True)}, "seed must be a whole number"),
    ("many seeds", {"seed": torch.tensor([1, 2])}, "seed must be a whole number"),
    ("a negative seed", {"seed": -1}, r"\[0, 2\*\*64\), got -1"),
    ("a huge seed", {"seed": 2**64}, r"\[0, 2\*\*64\), got 18446744073709551616"),
    ("no drafter", {"drafter": None}, "drafter must be a name .* got None; .* 'none'"),
    ("a number as drafter", {"drafter": 3}, "drafter must be a name .* got 3"),
    ("a class as drafter", {"drafter": NoDrafter}, "drafter must be a name .*NoDrafter"),
    ("a model as drafter", {"drafter": tiny(0)}, "drafter must be a name .* LlamaForCausalLM"),
    ("no verifier", {"verifier": None}, "verifier must be a name .* got None"),
    ("a class as verifier", {"verifier": type(make_verifier("match"))}, "verifier must be a name"),
    ("a name as draft model", {"drafter": "model", "draft_model": "gpt2"}, "draft_model must be a loaded .* 'gpt2'.*load"),
    ("a path as draft model", {"drafter": "model", "draft_model": Path("x")}, "draft_model must be a loaded .* 'x'"),
    ("a name among draft models", {"drafter": "model", "draft_model": [tiny(0), "gpt2"]}, "draft_model .* 'gpt2'"),
    ("no draft model in a list", {"drafter": "model", "draft_model": [None]}, "draft_model must be a loaded .* None"),
    ("no draft models", {"drafter": "model", "draft_model": []}, "draft_model"),
    ("a useless draft model", {"drafter": "ngram", "draft_model": tiny(0)}, "'ngram' runs no draft model"),
    ("a useless one in a hybrid", {"drafter": "hybrid:parts=ngram+recycling", "draft_model": tiny(0)}, "runs no draft model"),
    ("a useless one beside an object", {"drafter": NoDrafter(), "draft_model": tiny(0)}, "'none' runs no draft model"),
    ("text to call", {"on_step": "print"}, "on_step must be a function or None, got 'print'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_anything_else_is_refused_in_a_sentence(model: Any, options: dict[str, Any], message: str) -> None:
    """Each of these was an error out of the middle of some library, or was ignored."""
    options = dict(options)
    if options.get("past_key_values") == "full":
        options["past_key_values"] = model(IDS).past_key_values
    with pytest.raises(ValueError, match=message):
        specdec.generate(model, **{"inputs": IDS, **settings(**options)})


MODELS: list[tuple[Callable[[], Any], type[ValueError], str]] = [
    (lambda: "smollm2-135m", ValueError, "model must be a loaded model, got the name .*load_model"),
    (lambda: None, ValueError, "model must be a loaded .* None"),
    (lambda: torch.nn.Linear(2, 2), ValueError, "model must be a loaded causal language model"),
    (lambda: LlamaModel(tiny(0).config), UnsupportedModelError, "AutoModelForCausalLM"),
]


@pytest.mark.parametrize(("build", "kind", "message"), MODELS, ids=["name", "None", "layer", "headless"])
def test_what_is_no_language_model_is_refused(build: Callable[[], Any], kind: type[ValueError], message: str) -> None:
    with pytest.raises(kind, match=message):
        specdec.generate(build(), IDS, max_new_tokens=4)


def test_a_mask_through_the_hook_is_checked_too(model: Any) -> None:
    """All ones are dropped on the way there, so a wider one only shows in the positions that were counted from it."""
    loop = specdec.custom_generate("ngram")
    for mask in (torch.ones(1, 11), torch.ones(1, 5), torch.arange(11)[None].clamp(max=1), torch.tensor([[0, 1, 1]])):
        with pytest.raises(ValueError, match=r"attention.mask"):
            model.generate(IDS, attention_mask=mask, custom_generate=loop, **settings())


@pytest.mark.parametrize(
    "options", [{"assistant_model": tiny(1, 1)}, {"synced_gpus": True}], ids=lambda o: next(iter(o))
)
def test_the_hook_refuses_what_it_is_not_told(model: Any, options: dict[str, Any]) -> None:
    """transformers drops both for a function in its hook: they had no effect, without a word."""
    with pytest.raises(UnsupportedOptionError, match=next(iter(options))):
        model.generate(IDS, custom_generate=specdec.custom_generate("ngram"), **options, **settings())


# --- sampling options, on both ways to a distribution

WARPED: list[dict[str, Any]] = [
    {"top_p": 0.0}, {"top_p": 0}, {"top_p": 1.0}, {"top_p": 1}, {"top_p": 1e-9}, {"top_p": 1.5}, {"top_k": 0}, {"top_k": 1},
    {"top_p": 0.0, "top_k": 0}, {"top_p": 0.0, "temperature": 1.7, "min_p": 0.3}, {"min_p": 0.0}, {"min_p": 1.0}, {"min_p": 1},
    {"typical_p": 0.2}, {"typical_p": 1.0}, {"epsilon_cutoff": 0.3}, {"epsilon_cutoff": 0.0}, {"eta_cutoff": 0.4}, {"top_h": 0.4},
    {"top_k": 1000}, {"temperature": 1.0}, {"temperature": 1}, {"temperature": 0.01}, {"temperature": None, "top_k": None, "top_p": None},
]  # fmt: skip


def policies(model: Any, **options: Any) -> list[Callable[[Tensor], Tensor]]:
    """What generate() samples from, ours by the fused way where it is taken, and ours by its processors."""
    seen: list[tuple[Any, Any]] = []

    def look(model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **_: Any) -> Tensor:
        seen.append((logits_processor, generation_config))
        return input_ids

    model.generate(IDS, custom_generate=look, **settings(do_sample=True, **options))
    ((processors, config),) = seen

    def ours(config: Any) -> Callable[[Tensor], Tensor]:
        logits_transform = fast_policy(processors, config) or ProcessorTransform(
            processors, sampling_params(config), {0: []}
        )
        row, tree = Row(0, IDS[0].tolist(), 20), TokenTree.root(int(IDS[0, -1]))
        return lambda logits: logits_transform.target_probs(row, tree, specdec.interfaces.Scores(logits)).probs(0)

    fused, config.output_scores = ours(config), True
    return [lambda logits: processors(IDS, logits.clone()).softmax(-1)[0], fused, ours(config)]


@pytest.mark.parametrize("options", WARPED, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_the_edges_of_sampling_options_are_those_of_generate(model: Any, options: dict[str, Any]) -> None:
    """top_p=0 keeps the best token there, and was refused here or taken for 1."""
    expected, *found = policies(model, **options)
    for seed in range(5):
        logits = 3 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
        for ours in found:
            torch.testing.assert_close(ours(logits), expected(logits), rtol=1e-5, atol=1e-6)


def test_a_drafter_imitates_the_best_token_where_top_p_is_zero() -> None:
    config = GenerationConfig(do_sample=True, top_p=0.0, temperature=1.0, top_k=0)
    assert fast_policy([RepetitionPenaltyLogitsProcessor(1.2), TopPLogitsWarper(0.0)], config) is None
    assert 0 < sampling_params(config).top_p < 1e-9


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"top_p": -0.1}, {"top_k": -1}, {"min_p": 2.0}, {"typical_p": 0.0}],
    ids=str,
)
def test_values_that_generate_refuses_are_refused_with_its_words(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))) as theirs:
        model.generate(IDS, **settings(do_sample=True, **options))
    with pytest.raises(ValueError, match=next(iter(options))) as ours:
        specdec.generate(model, IDS, **settings(do_sample=True, **options))
    assert str(ours.value) == str(theirs.value)


def test_warpers_of_the_caller_count_as_generate_counts_them(model: Any) -> None:
    warpers = [MinPLogitsWarper(0.9), TemperatureLogitsWarper(3.0)]
    given = settings(logits_processor=warpers, stopping_criteria=StoppingCriteriaList())
    assert torch.equal(specdec.generate(model, IDS, **given), model.generate(IDS, **given))


# --- memory


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_nothing_that_a_pass_computed_outlives_the_next_one(model: Any, drafter: str) -> None:
    """A kept row of float32 logits was a view of everything that its pass had computed; so was the last step's."""
    passes: list[StorageWeakRef] = []
    alive: list[int] = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: alive.append(sum(not each.expired() for each in passes))),
        model.register_forward_hook(lambda *a: passes.append(StorageWeakRef(a[-1].logits.untyped_storage()))),
    ]
    try:
        given = settings(return_dict_in_generate=True, output_logits=True, output_scores=True, eos_token_id=None)
        out = specdec.generate(model, IDS, drafter=drafter, **given)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(alive) > 3
    assert max(alive[1:]) == 0
    assert all(each.dtype == torch.float32 for each in (*out.logits, *out.scores))


def test_logits_and_scores_have_the_precision_that_generate_gives_them() -> None:
    wide = tiny(0).double()
    given = settings(return_dict_in_generate=True, output_logits=True, output_scores=True)
    expected, found = wide.generate(IDS, **given), specdec.generate(wide, IDS, **given)
    for name in ("logits", "scores"):
        torch.testing.assert_close(torch.stack(getattr(found, name)), torch.stack(getattr(expected, name)))


def test_noise_takes_any_kind_of_whole_number() -> None:
    assert PhiloxRng(np.int64(5)) == PhiloxRng(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be a whole number"):
        PhiloxRng("5")  # type: ignore[arg-type]
