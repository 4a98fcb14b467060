"""Where rows end: padding, rows that go on, and criteria that need the tokenizer, each as in model.generate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tinyllama import Collector, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

import specdec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, about options that are at odds

THREE = torch.tensor([[0, 0, 0, 5, 9, 12, 7, 3], [8, 9, 10, 8, 9, 10, 8, 9], [0, 0, 30, 31, 30, 31, 30, 31]])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny(0)


def divisible(by: int) -> Callable[..., Tensor]:
    return lambda ids, scores, **_: ids[:, -1] % by == 0


def longer_than(length: int) -> Callable[..., Tensor]:
    return lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] > length)


def never(ids: Tensor, scores: Any, **_: Any) -> Tensor:
    return torch.zeros(len(ids), dtype=torch.bool)


class WithEndToken(StoppingCriteria):  # type: ignore[misc]
    """A user's own criterion; its attribute makes generate() fill finished rows with padding."""

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] == self.eos_token_id


CRITERIA: list[list[Any]] = [
    [divisible(3)], [divisible(7)], [divisible(5), divisible(11)], [divisible(61)], [longer_than(13)], [never],
    [divisible(2), longer_than(10)], [WithEndToken(57)], [WithEndToken(57), divisible(5)], [MaxLengthCriteria(19), divisible(3)],
    [EosTokenCriteria([57, 10])],
]  # fmt: skip


@pytest.mark.parametrize("eos", [None, [2, 57]], ids=["no end token", "end tokens"])
@pytest.mark.parametrize(
    "criteria", CRITERIA, ids=lambda c: "+".join(getattr(x, "__qualname__", type(x).__name__) for x in c)
)
@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_rows_that_a_criterion_stops_go_on_or_are_padded_as_in_generate(
    model: Any, criteria: list[Any], eos: Any, drafter: str
) -> None:
    """Without an end token generate() gives a stopped row more tokens until all have stopped; here it was padded."""
    draft_model = model if drafter == "model" else None
    for rows in ([0, 1, 2], [0]):
        ids = THREE[rows]
        given = {"attention_mask": (ids != 0).long(), "max_new_tokens": 16, "do_sample": False}
        given |= {
            "stopping_criteria": criteria,
            "eos_token_id": eos,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        expected, found = Collector(), Collector()
        theirs = model.generate(ids, streamer=expected, **given)
        ours = specdec.generate(
            model, ids, streamer=found, drafter=drafter, draft_model=draft_model, adaptive=False, **given
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        assert found.parts == expected.parts
        assert len(ours.logits) == len(theirs.logits)
        if eos is None and len(rows) == 1:
            torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


def test_rows_that_go_on_have_the_logits_of_their_own_text(model: Any) -> None:
    given = {
        "attention_mask": (THREE != 0).long(), "max_new_tokens": 16, "do_sample": False, "eos_token_id": None,
        "stopping_criteria": [divisible(3)], "return_dict_in_generate": True, "output_logits": True, "output_scores": True,
    }  # fmt: skip
    theirs, ours = model.generate(THREE, **given), specdec.generate(model, THREE, adaptive=False, **given)
    for name in ("logits", "scores"):
        found, expected = torch.stack(getattr(ours, name)), torch.stack(getattr(theirs, name))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_padding_that_is_needed_and_not_set_is_asked_for(model: Any) -> None:
    bare = tiny(0)
    bare.generation_config = GenerationConfig()
    given = {"max_new_tokens": 4, "stopping_criteria": [WithEndToken(57)]}
    with pytest.raises(ValueError, match="pad_token_id, which is not set"):
        specdec.generate(bare, THREE, attention_mask=(THREE != 0).long(), **given)
    assert specdec.generate(bare, THREE[1:2], **given).shape[1] > THREE.shape[1], "one row needs no padding"


# --- what needs the tokenizer

WORDS = ["http", "https", "ht", "://", "ab", "abc", "an", "exam", "example", " an", " ab"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few words that begin with each other."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<pad>", "<bos>", "<eos>", *letters])}
    merges = []
    for word in WORDS:
        parts = list(word.replace(" ", "Ġ"))
        while len(parts) > 1:
            merged = parts[0] + parts[1]
            if merged not in vocab:
                vocab[merged] = len(vocab)
                merges.append((parts[0], parts[1]))
            parts = [merged, *parts[2:]]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)


TOKENIZER = word_tokenizer()


@pytest.fixture
def speaker() -> LlamaForCausalLM:
    """A model of the tokenizer's vocabulary; its configs may be changed."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.15, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def stopping_text(speaker: Any, ids: Tensor) -> str:
    """A letter that the model writes third."""
    return str(TOKENIZER.decode(speaker.generate(ids, max_new_tokens=3, do_sample=False)[0, -1]))


@pytest.mark.parametrize("keyword", ["absent", "None", "given"])
@pytest.mark.parametrize("in_config", [None, "plain", "set"])
@pytest.mark.parametrize("in_model", [False, True])
def test_stop_strings_come_from_where_generate_takes_them(
    speaker: Any, keyword: str, in_config: str | None, in_model: bool
) -> None:
    """The model's own, beside the caller's config, made generate() say that no tokenizer was passed."""
    ids = TOKENIZER("an example ab", return_tensors="pt").input_ids
    stop = stopping_text(speaker, ids)
    given: dict[str, Any] = {"tokenizer": TOKENIZER, "max_new_tokens": 9, "do_sample": False}
    if in_config is not None:
        strings = ["never seen", stop] if in_config == "set" else None
        given["generation_config"] = GenerationConfig(stop_strings=strings, max_new_tokens=9, do_sample=False)
        del given["max_new_tokens"], given["do_sample"]
    if keyword != "absent":
        given["stop_strings"] = None if keyword == "None" else "http"
    if in_model:
        speaker.generation_config.stop_strings = [stop]
    expected = speaker.generate(ids, **given)
    assert torch.equal(specdec.generate(speaker, ids, **given), expected)
    assert (expected.shape[1] == ids.shape[1] + 3) is (keyword == "absent" and (in_config == "set" or in_model))


def test_a_stop_string_criterion_of_the_caller_replaces_generates(speaker: Any) -> None:
    ids = TOKENIZER("an example ab", return_tensors="pt").input_ids
    own = StopStringCriteria(TOKENIZER, ["never seen"])
    given = {"tokenizer": TOKENIZER, "max_new_tokens": 9, "do_sample": False, "stopping_criteria": [own]}
    given["stop_strings"] = [stopping_text(speaker, ids)]
    assert torch.equal(specdec.generate(speaker, ids, **given), speaker.generate(ids, **given))


@pytest.mark.parametrize("option", ["stop_strings", "token_healing"])
def test_what_needs_the_tokenizer_says_so(speaker: Any, option: str) -> None:
    ids = TOKENIZER("an", return_tensors="pt").input_ids
    given = {option: ["x"] if option == "stop_strings" else True, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=f"for {option} pass the tokenizer"):
        specdec.generate(speaker, ids, **given)
    with pytest.raises(ValueError, match=f"for {option} tokenizer must be a tokenizer of transformers, got str"):
        specdec.generate(speaker, ids, tokenizer="gpt2", **given)


HEALED: dict[str, list[str]] = {
    "a tail that may go on": ["see ht"],
    "a tail that may not": ["an example."],
    "spaces, which are stripped": ["see http  "],
    "one token": ["ab"],
    "a padded batch": ["go to ht", "an exam", "ab"],
    "a padded batch with spaces": ["go to ht ", "an exam ", "x ab "],
}


@pytest.mark.parametrize("texts", HEALED.values(), ids=list(HEALED))
@pytest.mark.parametrize("place", ["keyword", "config"])
def test_tokens_are_healed_as_in_generate(speaker: Any, texts: list[str], place: str) -> None:
    """The tokenizer was not handed on, and generate() then claimed that there was none."""
    inputs = dict(TOKENIZER(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
    given: dict[str, Any] = {"tokenizer": TOKENIZER}
    options = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.1, "min_new_tokens": 3}
    if place == "keyword":
        given |= {**options, "token_healing": True}
    else:
        given["generation_config"] = GenerationConfig(token_healing=True, **options)
    expected, found = Collector(), Collector()
    out = speaker.generate(**inputs, streamer=expected, **given)
    assert torch.equal(specdec.generate(speaker, **inputs, streamer=found, **given), out)
    assert found.parts == expected.parts


def test_healing_that_would_heal_itself_is_refused(speaker: Any) -> None:
    """transformers heals by a generate() of its own, which reads the model's config and then misses the tokenizer."""
    speaker.generation_config.token_healing = True
    ids = TOKENIZER("see ht", return_tensors="pt").input_ids
    with pytest.raises(ValueError, match=r"must not be set in model\.generation_config"):
        specdec.generate(speaker, ids, tokenizer=TOKENIZER, max_new_tokens=4)
    out = specdec.generate(speaker, ids, token_healing=False, max_new_tokens=4)
    assert torch.equal(out[:, : ids.shape[1]], ids)


def test_each_sample_of_a_prompt_is_healed(speaker: Any) -> None:
    ids = TOKENIZER("see ht", return_tensors="pt").input_ids
    given = {"token_healing": True, "tokenizer": TOKENIZER, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    expected = speaker.generate(ids, max_new_tokens=1, **given)
    torch.manual_seed(0)
    found = specdec.generate(speaker, ids, max_new_tokens=1, **given)
    assert torch.equal(found[:, : ids.shape[1]], expected[:, : ids.shape[1]])
    assert found.shape == expected.shape


def test_the_callers_config_is_neither_changed_nor_called_deprecated(
    speaker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What is turned off for the hook must not look like keywords that the caller gave beside a config."""
    config = GenerationConfig(stop_strings=["never seen"], token_healing=True, max_new_tokens=4)
    before = config.to_dict()
    ids = TOKENIZER("see ht", return_tensors="pt").input_ids
    with caplog.at_level(logging.WARNING, logger="transformers"):
        specdec.generate(speaker, ids, config, tokenizer=TOKENIZER)
    assert config.to_dict() == before
    assert "deprecated" not in caplog.text
