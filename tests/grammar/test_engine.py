"""Requests with grammars of their own, side by side in one engine: each gets the text of a call of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from json_grammars import END, GRAMMARS, PERSON
from tinychat import make_model, make_tokenizer

import specdec
from specdec.grammar.inputs import Grammar

TOKENIZER = make_tokenizer()
PROMPTS = ["abc def abc", "hello", '{"n": 1} {"n": 2}', "foo 12 foo"]
FORMS = [Grammar.json_schema(PERSON), GRAMMARS["choices"], None, GRAMMARS["regex"]]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("drafter", ["none", "auto", "ngram"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_every_request_gets_what_generate_gives_it_alone(drafter: str, temperature: float) -> None:
    model = make_model(eos=END)
    settings = [
        specdec.RequestSettings(max_new_tokens=70, temperature=temperature, seed=i, grammar=form)
        for i, form in enumerate(FORMS)
    ]
    with specdec.Engine(model, tokenizer=TOKENIZER, drafter=drafter, accelerate=False, max_rows=3) as engine:
        answers = engine.run(PROMPTS, settings)
    for i, (prompt, form, answer) in enumerate(zip(PROMPTS, FORMS, answers, strict=True)):
        ids = torch.tensor([TOKENIZER.encode(prompt)])
        options: dict[str, Any] = {"do_sample": temperature > 0, "pad_token_id": END, "max_new_tokens": 70}
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": 0, "seed": i}
        grammar = {} if form is None else {"grammar": form, "tokenizer": TOKENIZER}
        alone = specdec.generate(
            model, ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **grammar, **options
        )
        assert answer.tokens == alone.sequences[0, ids.shape[1] :].tolist()
        assert answer.finish_reason == alone.finish_reasons[0]


def test_a_grammar_that_cannot_be_is_refused_when_it_is_asked_for() -> None:
    with specdec.Engine(make_model(eos=END), tokenizer=TOKENIZER, drafter="none", accelerate=False) as engine:
        with pytest.raises(ValueError, match="unclosed group"):
            engine.submit("a", specdec.RequestSettings(grammar=Grammar.regex("(a")))
        with pytest.raises(ValueError, match=r"must be a specdec\.Grammar"):
            specdec.RequestSettings(grammar="yes")  # type: ignore[arg-type]
    with (
        specdec.Engine(make_model(eos=END), drafter="none", accelerate=False) as engine,
        pytest.raises(ValueError, match="needs a tokenizer"),
    ):
        engine.submit([5], specdec.RequestSettings(grammar=Grammar.json()))
