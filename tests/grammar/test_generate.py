"""``generate(grammar=...)``: token-identical with transformers under a processor of the same library, and always valid."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch
from json_grammars import END, GRAMMARS, PERSON
from tinychat import make_model, make_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

import specdec
from specdec.errors import GrammarError
from specdec.generation.constrained import model_compiler
from specdec.grammar.inputs import Grammar
from specdec.grammar.masks import GrammarProcessor

DRAFTERS = (
    "none", "auto", "ngram", "recycling", "model", "model:shape=2x2", "hybrid", "grammar", 'grammar:base="model:shape=best-first"',
    "hybrid:parts=grammar+ngram",
)  # fmt: skip
SHORT = {
    "type": "object",
    "properties": {"tone": {"enum": ["warm", "cold", "wärmer"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99},
                   "s": {"type": "string", "maxLength": 4}},
    "required": ["tone", "n", "s"], "additionalProperties": False,
}  # fmt: skip
WIDE = [Grammar.json_schema(SHORT), GRAMMARS["choices"], None, Grammar.regex("(foo|food|bar){1,3}[0-9]{2,4}")]
TOKENIZER = make_tokenizer()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(eos=END)


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    return make_model(num_hidden_layers=1, eos=END)


def inputs(num: int) -> dict[str, Tensor]:
    prompts = [TOKENIZER.encode(text) for text in ("abc def abc", "hello", '{"n": 1} {"n": 2}', "foo 12 foo")][:num]
    width = max(map(len, prompts))
    ids = torch.tensor([[END] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def reference(model: Any, grammars: Sequence[Grammar | None], **options: Any) -> Any:
    """transformers' own generate() under our processor: plain constrained decoding."""
    compiler = model_compiler(model, TOKENIZER, (END,))
    states = [None if grammar is None else compiler.start(grammar) for grammar in grammars]
    own = options.pop("logits_processor", [])
    return model.generate(logits_processor=[*own, GrammarProcessor(states, compiler.ends)], pad_token_id=END, **options)


def ours(model: Any, small: Any, grammar: Any, drafter: str, **options: Any) -> Any:
    draft = {"draft_model": small} if "model" in drafter else {}
    return specdec.generate(
        model, grammar=grammar, tokenizer=TOKENIZER, drafter=drafter, pad_token_id=END, **{**draft, **options}
    )


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("num_rows", [1, 4])
def test_greedy_tokens_equal_transformers_under_the_same_grammar(
    model: Any, small: Any, num_rows: int, drafter: str
) -> None:
    options: dict[str, Any] = {**inputs(num_rows), "max_new_tokens": 60, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        out = ours(model, small, WIDE[:num_rows], drafter, **options)
    assert torch.equal(out, reference(model, WIDE[:num_rows], **options))


class Never(LogitsProcessor):  # type: ignore[misc]
    """Of the caller's own kind, so that it is asked about the whole batch, column by column."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % 90 + 100] -= 5.0
        return scores


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 9, "repetition_penalty": 1.1},
    {"logits_processor": [Never()]},
    {"stopping_criteria": StoppingCriteriaList([])},
    {"num_return_sequences": 1, "output_scores": True, "return_dict_in_generate": True},
]


@pytest.mark.parametrize("options", PENALTIES, ids=lambda o: "+".join(o))
@pytest.mark.parametrize("drafter", ["none", "auto"])
def test_it_is_so_beside_other_processors(model: Any, small: Any, drafter: str, options: dict[str, Any]) -> None:
    """The mask stands behind penalties and the caller's own processors, as in generate()."""
    grammars = [WIDE[0], WIDE[3]]
    options = {**inputs(2), "max_new_tokens": 60, "do_sample": False, **options}
    out, expected = ours(model, small, grammars, drafter, **options), reference(model, grammars, **options)
    if not isinstance(out, Tensor):
        for mine, theirs in zip(out.scores, expected.scores, strict=True):
            is_running = (mine != 0).any(-1)  # ours are zeros where a row had ended
            torch.testing.assert_close(mine[is_running], theirs[is_running], rtol=0, atol=1e-4)
        out, expected = out.sequences, expected.sequences
    assert torch.equal(out, expected)


def texts(output: Any, width: int) -> list[str]:
    return [TOKENIZER.decode(row, skip_special_tokens=True) for row in output.sequences[:, width:]]


def check(out: Any, width: int) -> None:
    for text, grammar, reason in zip(texts(out, width), WIDE, out.finish_reasons, strict=False):
        if grammar is not None and reason == "stop":
            if grammar is WIDE[0]:
                jsonschema.validate(json.loads(text), SHORT)
            elif grammar is WIDE[1]:
                assert text in ("yes", "no", "not now", "日本", "a|b (c)")


SAMPLING = [{"temperature": 0.7, "top_k": 0}, {"temperature": 1.5, "top_k": 40, "top_p": 0.9}]


@pytest.mark.parametrize("options", SAMPLING, ids=lambda o: str(o["temperature"]))
@pytest.mark.parametrize(("num_rows", "drafter"), [(1, "auto"), (1, "model"), *((4, name) for name in DRAFTERS[1:])])
def test_sampling_with_match_is_plain_constrained_decoding_with_the_same_seed(
    model: Any, small: Any, num_rows: int, drafter: str, options: dict[str, Any]
) -> None:
    asked = {
        **inputs(num_rows),
        "max_new_tokens": 60,
        "do_sample": True,
        "seed": 5,
        "return_dict_in_generate": True,
        **options,
    }
    out = ours(model, small, WIDE[:num_rows], drafter, **asked)
    plain = ours(model, small, WIDE[:num_rows], "none", **asked)
    assert torch.equal(out.sequences, plain.sequences)
    check(out, asked["input_ids"].shape[1])


@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
@pytest.mark.parametrize("options", [*SAMPLING, {"do_sample": False}], ids=lambda o: str(o.get("temperature", 0)))
@pytest.mark.parametrize("drafter", ["auto", "ngram", "model:shape=2x2", 'grammar:base="model"'])
def test_no_output_is_invalid(model: Any, small: Any, verifier: str, drafter: str, options: dict[str, Any]) -> None:
    for seed in range(2):
        asked = {
            **inputs(4),
            "max_new_tokens": 60,
            "do_sample": True,
            "seed": seed,
            "return_dict_in_generate": True,
            **options,
        }
        out = ours(model, small, WIDE, drafter, verifier=verifier, adaptive=False, **asked)
        check(out, asked["input_ids"].shape[1])
        assert set(out.finish_reasons[:2]) == {"stop"}


def test_one_grammar_is_for_all_rows_and_repeated_for_several_answers(model: Any) -> None:
    options: dict[str, Any] = {
        **inputs(2), "max_new_tokens": 40, "do_sample": True, "seed": 1, "num_return_sequences": 3,
        "return_dict_in_generate": True,
    }  # fmt: skip
    one = ours(model, None, Grammar.choices(["yes", "no"]), "auto", **options)
    assert set(texts(one, options["input_ids"].shape[1])) <= {"yes", "no"}
    two = ours(model, None, [Grammar.choices(["yes", "no"]), Grammar.choices(["maybe"])], "auto", **options)
    assert texts(two, options["input_ids"].shape[1])[3:] == ["maybe"] * 3


def test_what_is_forced_costs_few_passes(model: Any) -> None:
    """The structure of JSON is no choice of the model's, so its tokens need no pass of their own."""
    options: dict[str, Any] = {
        **inputs(1), "max_new_tokens": 120, "do_sample": False, "return_dict_in_generate": True, "max_nodes": 32,
        "adaptive": False,
    }  # fmt: skip
    keys = {f"a long name number {i}": {"enum": [True, False]} for i in range(3)}
    grammar = Grammar.json_schema(
        {"type": "object", "properties": keys, "required": list(keys), "additionalProperties": False}
    )
    out = ours(model, None, grammar, "grammar", **options)
    assert out.finish_reasons == ("stop",)
    assert out.stats.num_drafts <= out.stats.num_tokens / 6


class AtColumn(StoppingCriteria):  # type: ignore[misc]
    """Ends every row after a few tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 20)


def test_a_text_that_was_cut_is_said_to_be(model: Any) -> None:
    """A JSON text without its end must never pass for a whole one."""
    options: dict[str, Any] = {
        **inputs(1),
        "do_sample": False,
        "grammar": Grammar.json_schema(PERSON),
        "tokenizer": TOKENIZER,
    }
    out = specdec.generate(model, max_new_tokens=9, return_dict_in_generate=True, **options)
    assert out.finish_reasons == ("length",)
    with pytest.warns(UserWarning, match="row 0 ended before its grammar was complete"):
        specdec.generate(model, max_new_tokens=9, **options)
    stopped = specdec.generate(
        model, max_new_tokens=90, stopping_criteria=[AtColumn()], return_dict_in_generate=True, **options
    )
    assert stopped.finish_reasons == ("incomplete",)
    free = specdec.generate(model, **inputs(1), do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    assert free.finish_reasons == ("length",)


def test_reasons_are_told_of_the_end_and_not_of_the_padding_behind_it(model: Any) -> None:
    """Rows that wait for each other are padded in place."""
    grammars = [Grammar.choices(["a"]), Grammar.regex("[0-9]{30}"), Grammar.regex("[0-9]{90}"), None]
    options: dict[str, Any] = {**inputs(4), "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    for processors in ([], [Never()]):
        out = specdec.generate(
            model, grammar=grammars, tokenizer=TOKENIZER, pad_token_id=0, logits_processor=processors, **options
        )
        assert out.finish_reasons[:3] == ("stop", "stop", "length")


def test_digits_that_the_limit_cut_are_not_called_whole(model: Any) -> None:
    """The grammar would let the text end there, but the model did not end it."""
    out = ours(
        model, None, Grammar.regex("[0-9]{1,40}"), "auto", **inputs(1), max_new_tokens=2, return_dict_in_generate=True,
        do_sample=False,
    )  # fmt: skip
    assert out.finish_reasons == ("length",)


def test_the_hook_takes_a_processor(model: Any) -> None:
    """Inside somebody else's call the grammar is a processor, and drafts follow it all the same."""
    compiler = model_compiler(model, TOKENIZER, (END,))
    processor = GrammarProcessor([compiler.start(WIDE[0])] if WIDE[0] else [None], compiler.ends)
    options: dict[str, Any] = {**inputs(1), "max_new_tokens": 60, "do_sample": False}
    out = model.generate(
        custom_generate=specdec.custom_generate("grammar"), logits_processor=[processor], pad_token_id=END, **options
    )
    assert torch.equal(out, reference(model, [WIDE[0]], **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "pass the tokenizer"),
        ({"grammar": {"type": "object"}}, "must be a specdec.Grammar"),
        ({"grammar": [Grammar.json(), "x"]}, "must hold specdec.Grammar"),
        ({"grammar": []}, "must be a specdec.Grammar"),
        ({"grammar": [Grammar.json()] * 3}, "3 for 1 rows"),
        ({"eos_token_id": None, "generation_config": None}, "pass eos_token_id"),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_is_refused(model: Any, options: dict[str, Any], message: str) -> None:
    asked = {"grammar": Grammar.json(), "tokenizer": TOKENIZER, "max_new_tokens": 4, **inputs(1), **options}
    with pytest.raises(ValueError, match=message):
        specdec.generate(model, **asked)


def test_an_end_that_is_banned_where_the_grammar_asks_for_it_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match="every token is excluded"):
        ours(
            model,
            None,
            Grammar.choices(["a"]),
            "auto",
            **inputs(1),
            min_new_tokens=9,
            max_new_tokens=20,
            do_sample=False,
        )
    assert issubclass(GrammarError, ValueError)
