"""Answers that follow a grammar, by whichever field it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from fake_engine import FakeEngine
from served import HELLO, Served
from tinychat import make_model, make_tokenizer

import specdec
from specdec.serve.service import Defaults
from specdec.serving.engine import Engine
from specdec.serving.request import RequestSettings

pytest.importorskip("specdec.grammar.inputs", reason="needs the grammars of the library")
pytest.importorskip("llguidance")
if "grammar" not in {field.name for field in fields(RequestSettings)}:
    pytest.skip("the engine takes no grammar", allow_module_level=True)

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
NAMED = {"name": "pair", "strict": True, "schema": SCHEMA}
LARK = 'start: "a" "b"+ "c"'
FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, specdec.Grammar.json_schema(SCHEMA)),
    ({"response_format": {"type": "json_object"}}, specdec.Grammar.json_schema({"type": "object"})),
    ({"guided_json": SCHEMA}, specdec.Grammar.json_schema(SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, specdec.Grammar.json_schema(SCHEMA)),
    ({"guided_regex": "[0-9]{3}"}, specdec.Grammar.regex("[0-9]{3}")),
    ({"guided_choice": ["yes", "no"]}, specdec.Grammar.choices(["yes", "no"])),
    ({"guided_grammar": LARK}, specdec.Grammar.lark(LARK)),
    ({"structured_outputs": {"json": SCHEMA}}, specdec.Grammar.json_schema(SCHEMA)),
    ({"structured_outputs": {"json_object": True}}, specdec.Grammar.json_schema({"type": "object"})),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, specdec.Grammar.regex("[0-9]{3}")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, specdec.Grammar.choices(["yes", "no"])),
    ({"structured_outputs": {"grammar": LARK}}, specdec.Grammar.lark(LARK)),
]


def test_every_field_means_its_grammar() -> None:
    engine = FakeEngine(make_tokenizer())
    with Served(engine) as served:
        for asked, grammar in FORMS:
            assert served.chat(**asked).status == 200
            assert engine.asked[-1].settings.grammar == grammar, asked
        assert served.chat(response_format={"type": "text"}).status == 200
        assert engine.asked[-1].settings.grammar is None
    engine.close()


@pytest.fixture(scope="module")
def served(one_thread: None) -> Iterator[Served]:
    with (
        Engine(make_model(), tokenizer=make_tokenizer(), drafter="ngram", accelerate=False, max_rows=4) as engine,
        Served(engine, defaults=Defaults(end_ids=(256,))) as server,
    ):
        yield server


@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_answers_follow_the_grammar_with_and_without_speculation(served: Served, seed: int, draft: bool) -> None:
    """The model is random: nothing but the grammar makes its text a pair."""
    asked = {"max_tokens": 100, "seed": seed, "draft": draft}
    choice = served.chat(response_format={"type": "json_schema", "json_schema": NAMED}, **asked).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    pair = json.loads(choice["message"]["content"])
    assert set(pair) == {"a", "b"}
    assert pair["a"] in range(10)
    assert pair["b"] in ("x", "y")
    (choice,) = served.chat(guided_choice=["yes", "no"], **asked).json["choices"]
    assert choice["message"]["content"] in ("yes", "no")
    (choice,) = served.chat(structured_outputs={"regex": "[0-9]{3}é"}, **asked).json["choices"]
    assert choice["message"]["content"][:3].isdigit()
    assert choice["message"]["content"][3:] == "é"


def test_openais_client_parses_what_it_asks_for(served: Served) -> None:
    from pydantic import BaseModel

    class Pair(BaseModel):
        a: bool
        b: bool

    client = served.client()
    answer = client.chat.completions.parse(model="tiny", messages=HELLO, max_tokens=100, response_format=Pair)
    assert isinstance(answer.choices[0].message.parsed, Pair)
    client.close()


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: nonesuch"}, "guided_grammar"),
        ({"guided_json": {"type": "nonesuch"}}, "guided_json"),
        ({"guided_json": {"type": "string", "uniqueItems": True}}, "guided_json"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "response_format"),
    ],
)
def test_a_damaged_grammar_is_refused_by_its_field(served: Served, asked: dict[str, Any], param: str) -> None:
    answer = served.chat(**asked)
    assert (answer.status, answer.error["param"]) == (400, param), answer.text
