"""What may be given as a grammar, what is refused and in which words, and whether what is promised is enforced."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from json_grammars import END, compiler, parsed, walk
from pydantic import BaseModel
from tinychat import make_tokenizer

import specdec
from specdec.errors import GrammarError
from specdec.grammar.compiler import GrammarCompiler, end_tokens
from specdec.grammar.inputs import Grammar
from specdec.grammar.with_llguidance import ENFORCED


class Person(BaseModel):
    name: str
    age: int | None


ANY = {"type": "string", "maxLength": 3}
SCHEMAS: dict[str, dict[str, Any]] = {
    "type": {"type": ["integer", "null", "boolean"]},
    "number": {"type": "number"},
    "enum": {"enum": [1, "a\n\"b\"", None, {"x": [1]}, "ü"]},
    "const": {"const": {"a": [1, "b"]}},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "anyOf": {"anyOf": [{"type": "integer"}, ANY]},
    "oneOf": {"oneOf": [{"type": "integer"}, ANY]},
    "$ref": {"$ref": "#/$defs/x", "$defs": {"x": {"type": "string", "maxLength": 3, "minLength": 2}}},
    "siblings of $ref": {"$ref": "#/$defs/x", "minLength": 2, "$defs": {"x": ANY}},
    "properties": {"type": "object", "properties": {"a": ANY, "b": {"type": "null"}}, "additionalProperties": False},
    "required": {"type": "object", "properties": {"a": ANY}, "required": ["z"], "additionalProperties": ANY},
    "patternProperties": {
        "type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}}, "additionalProperties": False, "minProperties": 1,
    },
    "additionalProperties": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "min and maxProperties": {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2, "maxProperties": 3},
    "items": {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 3},
    "prefixItems": {"type": "array", "prefixItems": [ANY, {"type": "null"}], "items": False, "minItems": 2},
    "additionalItems": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array", "items": [{"type": "null"}], "additionalItems": {"type": "boolean"}, "minItems": 2,
    },
    "string lengths": {"type": "string", "minLength": 2, "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,3}$"},
    "pattern in the middle": {"type": "string", "pattern": "b[0-9]", "maxLength": 6},
    "pattern with maxLength": {"type": "string", "pattern": "^(ab)*$", "maxLength": 5},
    "minimum and maximum": {"type": "integer", "minimum": -7, "maximum": 123},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 17},
    "bounds of numbers": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2},
    "multipleOf": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    "recursion": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}},
                        "required": ["c"], "additionalProperties": False}},
    },
    **{f"format {name}": {"type": "string", "format": name} for name in sorted(ENFORCED.formats)},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("is_spaced", [False, True], ids=["dense", "spaced"])
def test_every_text_that_a_schema_allows_is_valid(name: str, is_spaced: bool) -> None:
    """Guards a keyword that is said to be enforced and is not; jsonschema judges."""
    schema, rng = SCHEMAS[name], random.Random(0)
    start = compiler().start(Grammar.json_schema(schema, is_spaced=is_spaced))
    checker = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    judge = checker(schema, format_checker=checker.FORMAT_CHECKER)
    num_whole = 0
    for _ in range(25):
        tokens = walk(start.fork(), rng, 150, hurry=rng.randrange(25))
        if tokens[-1] == END:
            num_whole += 1
            judge.validate(parsed(tokens))
    assert num_whole >= 3


@pytest.mark.parametrize("behind", ["", "T10:20:30Z"], ids=["date", "date-time"])
@pytest.mark.parametrize(
    ("day", "is_real"),
    [("2024-02-29", True), ("2023-02-29", False), ("1900-02-29", False), ("2000-02-29", True), ("2023-02-28", True),
     ("2023-02-30", False), ("2023-04-31", False), ("2023-12-31", True), ("2023-13-01", False), ("2023-10-00", False)],
)  # fmt: skip
def test_dates_are_real(day: str, is_real: bool, behind: str) -> None:
    """llguidance alone would let every year be a leap year."""
    schema = {"properties": {"at": {"type": "string", "format": "date-time" if behind else "date"}}, "required": ["at"]}
    state = compiler().start(Grammar.json_schema({**schema, "type": "object", "additionalProperties": False}))
    text = make_tokenizer().encode(f'{{"at": "{day}{behind}"}}')
    assert all(map(state.accept, text)) == is_real


@pytest.mark.parametrize("keyword", sorted(ENFORCED.keywords))
def test_every_keyword_that_is_said_to_be_enforced_was_judged(keyword: str) -> None:
    assert f'"{keyword}":' in json.dumps(list(SCHEMAS.values()))


OBJECT = {"type": "object", "properties": {"a": ANY, "b": ANY}}
UNENFORCED: list[tuple[dict[str, Any], str]] = [
    *(
        (OBJECT | {key: value}, f"'{key}' at #")
        for key, value in {
            "propertyNames": {"pattern": "^a"}, "dependentRequired": {"a": ["b"]}, "dependentSchemas": {"a": {}},
            "dependencies": {"a": ["b"]}, "unevaluatedProperties": False, "not": {"type": "null"}, "if": {}, "then": {},
            "nullable": True, "discriminator": {"propertyName": "a"}, "minlength": 3, "x-guidance": {"lenient": True},
        }.items()
    ),
    *(({"type": "array", key: value}, f"'{key}' at #") for key, value in
      {"uniqueItems": True, "contains": ANY, "minContains": 1, "unevaluatedItems": False}.items()),
    ({"properties": {"a": {"anyOf": [{}, {"items": {"uniqueItems": True}}]}}}, "'uniqueItems' at #/properties/a/anyOf/1/items"),
    ({"$defs": {"x": {"contentEncoding": "base64"}}}, "'contentEncoding' at #/[$]defs/x"),
    ({"type": "string", "format": "unknown"}, "format 'unknown' at #; it knows date"),
    ({"type": "string", "format": "uri-reference"}, "format 'uri-reference'"),
    ({"oneOf": [ANY, {"type": "string", "minLength": 1}]}, "oneOf"),
    (OBJECT | {"minProperties": 1}, "min/maxProperties only supported"),
    ({"$ref": "http://example.com/x.json"}, "example.com"),
]  # fmt: skip
WRONG: list[tuple[Any, str]] = [
    ({"type": "string", "minLength": 5, "maxLength": 2}, r"minLength \(5\) is greater than maxLength"),
    ({"enum": []}, "anyOf is empty"),
    ({"type": "string", "enum": [1]}, "incompatible types"),
    (False, "allows nothing"),
    ({"$ref": "#"}, "allows no text at all"),
    ({"$ref": "#/$defs/none"}, "does not exist"),
    ({"type": "strin"}, "Invalid type: strin"),
    ({"properties": [1]}, "must be an object of schemas"),
    ({"items": 3}, "must be a schema"),
]


@pytest.mark.parametrize(("schema", "message"), [*UNENFORCED, *WRONG], ids=lambda value: str(value)[:40])
def test_what_is_not_enforced_or_impossible_is_refused_by_name(schema: Any, message: str) -> None:
    """Guards a promise that nobody keeps: JSON Schema would have unknown keywords ignored."""
    with pytest.raises(GrammarError, match=message):
        compiler().start(Grammar.json_schema(schema))


def test_a_schema_nested_too_deeply_is_refused() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    with pytest.raises(GrammarError, match="recursion limit"):
        compiler().start(Grammar.json_schema(deep))


def test_a_schema_is_a_dict_a_model_a_file_or_its_text(tmp_path: Path) -> None:
    schema = Person.model_json_schema()
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    same = [Grammar.json_schema(each) for each in (schema, Person, file, str(file), json.dumps(schema))]
    assert len(set(same)) == 1
    compiler().start(same[0])
    assert specdec.Grammar is Grammar


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema('{"type": '), "the JSON schema is no JSON"),
        (lambda: Grammar.json_schema("nonesuch.json"), "cannot read nonesuch.json"),
        (lambda: Grammar.json_schema(Path(__file__)), "test_inputs.py is no JSON"),
        (lambda: Grammar.json_schema([1]), "object or true or false"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema({"const": {1, 2}}), "JSON and nothing else"),
        (lambda: Grammar.json_schema({"const": float("nan")}), "JSON and nothing else"),
        (lambda: Grammar.choices([]), "1 to 50000 choices, got 0"),
        (lambda: Grammar.choices("yes"), "list of texts"),
        (lambda: Grammar.choices([1]), "list of texts"),  # type: ignore[list-item]
        (lambda: Grammar.regex(3), "is text, got 3"),  # type: ignore[arg-type]
        (lambda: Grammar.lark(Path("nonesuch.lark")), "cannot read nonesuch.lark"),
        (lambda: Grammar.json(backend="nonesuch"), "backend must be one of"),
    ],
)
def test_what_is_no_grammar_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.regex("(a"), "regular expression cannot be used.*unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.lark("nonsense"), "Lark grammar cannot be used"),
        (Grammar.lark("start: other"), 'unknown name: "other"'),
    ],
)
def test_a_damaged_grammar_is_refused(grammar: Grammar, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        compiler().start(grammar)


def texts(grammar: Grammar, num: int = 20, longest: int = 60) -> set[str]:
    rng, start = random.Random(0), compiler().start(grammar)
    found = (walk(start.fork(), rng, longest, hurry=longest) for _ in range(num))
    return {make_tokenizer().decode(tokens[:-1]) for tokens in found if tokens[-1] == END}


def test_choices_are_taken_character_by_character() -> None:
    choices = ["yes", "no", "a|b (c)*", "é\n", "日本", '"', "\\", "."]
    assert texts(Grammar.choices(choices), 100) == set(choices)


def test_a_grammar_that_allows_nothing_more_ends_at_once() -> None:
    state = compiler().start(Grammar.regex(""))
    assert state.allowed().nonzero().flatten().tolist() == [END]
    assert texts(Grammar.choices([""])) == {""}


def test_json_escapes_are_valid_whatever_is_escaped() -> None:
    schema = {"type": "string", "minLength": 3, "maxLength": 8}
    rng, start = random.Random(4), compiler().start(Grammar.json_schema(schema))
    for _ in range(40):
        state, tokens = start.fork(), list[int]()
        while END not in tokens:
            choices = state.allowed().nonzero().flatten().tolist()
            odd = [token for token in choices if token > 187 or token == 59]  # beyond ASCII, and backslashes
            tokens.append(rng.choice(odd if odd and rng.random() < 0.7 else choices))
            assert state.accept(tokens[-1])
        assert 3 <= len(parsed(tokens)) <= 8


@pytest.mark.parametrize("kind", ["choices", "enum"])
def test_ten_thousand_choices_take_bounded_time(kind: str) -> None:
    many = [f"value number {i} of {i * 7919 % 10007}" for i in range(10_000)]
    started = time.process_time()
    state = compiler().start(Grammar.choices(many) if kind == "choices" else Grammar.json_schema({"enum": many}))
    forced = state.forced(20)
    state.allowed()
    assert len(forced) >= len("value number ")
    assert time.process_time() - started < 20


def test_what_was_compiled_is_kept() -> None:
    kept = compiler()
    grammar = Grammar.choices([str(i) for i in range(500)])
    state, other = kept.start(grammar), kept.start(grammar)
    assert state is not other
    for i in range(100):
        kept.start(Grammar.choices([str(i)]))
    assert len(kept._compiled) <= 64


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(GrammarError, match="pass eos_token_id"):
        GrammarCompiler(make_tokenizer(), 300, ())
    assert end_tokens(None) == ()
    assert end_tokens(3) == end_tokens([3]) == (3,)


def test_a_tokenizer_that_is_none_is_refused() -> None:
    with pytest.raises(GrammarError, match="fast tokenizer"):
        GrammarCompiler(object(), 300, (256,)).start(Grammar.json())
