"""A model's saved generation config on the command line: the text is generate()'s, and given options replace its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tinychat
import torch
from transformers import GenerationConfig

import specdec
from specdec.analysis.load import load
from specdec.cli.saved import sampling_options

PROMPT = "abc abc abd"
NUM_NEW = 24


@pytest.fixture
def specdec_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tinychat.Command:
    return tinychat.Command(monkeypatch, capsys)


def saved(folder: Path, **fields: Any) -> tuple[str, Any]:
    """A model's folder whose generation config has ``fields``, and the model."""
    model = tinychat.make_model()
    target, fields = tinychat.save(folder, model), {"eos_token_id": 256, "pad_token_id": 256} | fields
    (folder / "generation_config.json").write_text(json.dumps(fields))  # transformers would not save all of these
    model.generation_config = GenerationConfig(**fields)
    return target, model


def encoded() -> dict[str, torch.Tensor]:
    chat = [{"role": "user", "content": PROMPT}]
    tokenizer = tinychat.make_tokenizer()
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def text_of(output: torch.Tensor) -> str:
    new = output[0, encoded()["input_ids"].shape[1] :]
    return str(tinychat.make_tokenizer().decode(new, skip_special_tokens=True)) + "\n"


def plain_tokens() -> list[int]:
    model = tinychat.make_model()
    output = model.generate(**encoded(), max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=256)
    return output[0, encoded()["input_ids"].shape[1] :].tolist()


THIRD = 2  # a place in the plain text: what is banned there was said there
GREEDY: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": "plain"},
    "suppress_tokens": {"suppress_tokens": "plain"},
    "begin_suppress_tokens": {"begin_suppress_tokens": "first"},
    "min_new_tokens": {"min_new_tokens": 10, "eos_token_id": "plain"},
    "a list of ends": {"eos_token_id": "plain"},
    "forced_eos_token_id": {"forced_eos_token_id": 97},
    "exponential_decay": {"exponential_decay_length_penalty": [3, 1.5]},
    "sequence_bias": {"sequence_bias": "plain"},
    "greedy with leftovers": {"do_sample": False, "temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.2},
    "stop_strings": {"stop_strings": "plain"},
    "max_length": {"max_length": 20, "repetition_penalty": 1.1},
    "what does not change the text": {
        "use_cache": False,
        "prompt_lookup_num_tokens": 3,
        "output_attentions": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "repetition_penalty": 1.3,
    },
}


def filled(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` with tokens of the plain text where they ask for these, so that they bite."""
    plain = plain_tokens()
    token, text = plain[THIRD], tinychat.make_tokenizer().decode(plain[THIRD : THIRD + 1])
    values: dict[tuple[str, str], Any] = {
        ("bad_words_ids", "plain"): [[token], plain[4:6]],
        ("suppress_tokens", "plain"): sorted({token, plain[5]}),
        ("begin_suppress_tokens", "first"): [plain[0]],
        ("eos_token_id", "plain"): [256, token],
        ("sequence_bias", "plain"): [[[token], -5.0]],
        ("stop_strings", "plain"): [text],
    }
    return {name: values.get((name, str(value)), value) for name, value in fields.items()}


def test_the_plain_text_is_long_enough_to_be_changed() -> None:
    assert len(plain_tokens()) == NUM_NEW


@pytest.mark.parametrize("case", GREEDY)
@pytest.mark.parametrize("drafter", ["ngram", "none"])
def test_greedy_text_is_that_of_generate_with_what_is_saved(
    specdec_command: tinychat.Command, tmp_path: Path, case: str, drafter: str
) -> None:
    """A saved repetition penalty was ignored: the command's text was another than generate()'s."""
    target, model = saved(tmp_path, **filled(GREEDY[case]))
    # transformers' own caching and returning are left as they are by default.
    model.generation_config = GenerationConfig(
        **{
            name: value
            for name, value in model.generation_config.to_diff_dict().items()
            if name not in ("use_cache", "prompt_lookup_num_tokens", "return_dict_in_generate", "output_scores")
        }
    )
    expected = model.generate(**encoded(), max_new_tokens=NUM_NEW, tokenizer=tinychat.make_tokenizer())
    ran = specdec_command(
        "generate",
        PROMPT,
        "--target",
        target,
        "--max-new-tokens",
        str(NUM_NEW),
        "--drafter",
        drafter,
        "--no-accelerate",
    )
    assert ran.status == 0, ran.err
    assert ran.out == text_of(expected)
    if case != "min_new_tokens":
        assert expected[0, encoded()["input_ids"].shape[1] :].tolist() != plain_tokens()


SAMPLED = {
    "temperature and top-p": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "all of them": {"do_sample": True, "temperature": 1.3, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.2},
    "the default top-k": {"do_sample": True},
}


@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_text_is_that_of_the_library_with_what_is_saved(
    specdec_command: tinychat.Command, tmp_path: Path, case: str
) -> None:
    target, model = saved(tmp_path, **SAMPLED[case])
    expected = specdec.generate(model, **encoded(), max_new_tokens=NUM_NEW, seed=5, drafter="none")
    words = ("generate", PROMPT, "--target", target, "--max-new-tokens", str(NUM_NEW), "--seed", "5", "--no-accelerate")
    assert specdec_command(*words).out == text_of(expected)
    greedy = model.generate(**encoded(), max_new_tokens=NUM_NEW, do_sample=False)
    assert specdec_command(*words, "--temperature", "0").out == text_of(greedy) != text_of(expected)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (("--temperature", "0.5"), {"do_sample": True, "temperature": 0.5}),
        (("--temperature", "2", "--top-k", "0"), {"do_sample": True, "temperature": 2.0, "top_k": 0}),
        (("--top-p", "1.0", "--min-p", "0.0"), {"top_p": 1.0, "min_p": 0.0}),
        (("--top-k", "3"), {"top_k": 3}),
    ],
    ids=str,
)
def test_options_replace_what_is_saved_and_leave_the_rest(
    specdec_command: tinychat.Command, tmp_path: Path, options: tuple[str, ...], given: dict[str, Any]
) -> None:
    target, model = saved(
        tmp_path, do_sample=True, temperature=1.4, top_k=30, top_p=0.8, min_p=0.05, repetition_penalty=1.3
    )
    expected = specdec.generate(model, **encoded(), max_new_tokens=NUM_NEW, seed=2, drafter="none", **given)
    words = ("--target", target, "--max-new-tokens", str(NUM_NEW), "--seed", "2", "--no-accelerate")
    assert specdec_command("generate", PROMPT, *words, *options).out == text_of(expected)


def test_without_the_saved_config_only_its_ends_hold(specdec_command: tinychat.Command, tmp_path: Path) -> None:
    plain = plain_tokens()
    end = next(i for i in range(5, NUM_NEW) if plain[i] not in plain[:i])
    target, _ = saved(tmp_path, repetition_penalty=1.5, do_sample=True, num_beams=3, eos_token_id=[256, plain[end]])
    words = ("--target", target, "--max-new-tokens", str(NUM_NEW), "--no-accelerate")
    ran = specdec_command("generate", PROMPT, *words, "--no-generation-config")
    assert ran.out == tinychat.make_tokenizer().decode(plain[: end + 1], skip_special_tokens=True) + "\n"
    refused = specdec_command("generate", PROMPT, *words)
    assert refused.status == 2
    assert refused.out == ""
    assert "saved generation config cannot be followed: num_beams=3" in refused.error
    assert refused.error.endswith("add --no-generation-config")


def test_bench_measures_the_models_own_distribution(specdec_command: tinychat.Command, tmp_path: Path) -> None:
    """All methods alike, whatever is saved: penalties would change what is compared and no draft is made for them."""
    target, _ = saved(tmp_path / "model", repetition_penalty=1.5, no_repeat_ngram_size=2)
    prompts = tinychat.write_prompts(tmp_path / "prompts.jsonl", [{"prompt": PROMPT}])
    trace = tmp_path / "trace.jsonl"
    words = ("--target", target, "--prompts", prompts, "--max-new-tokens", str(NUM_NEW), "--trace", str(trace))
    assert specdec_command("bench", *words).status == 0
    assert {output.token_ids for output in load(trace).outputs} == {tuple(plain_tokens())}


def test_only_what_is_given_is_told() -> None:
    assert sampling_options(None, None, None, None, is_saved=True) == {}
    assert sampling_options(0.0, 5, 0.9, None, is_saved=True) == {"do_sample": False}
    assert sampling_options(0.7, None, 0.9, None, is_saved=True) == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    assert sampling_options(None, None, None, None, is_saved=False) == {"do_sample": False}
    everything = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert sampling_options(0.7, None, None, None, is_saved=False) == everything
