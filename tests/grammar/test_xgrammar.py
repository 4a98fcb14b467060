"""The second backend, where it is installed: the same protocol, its own list of what it enforces."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch
from json_grammars import END, compiler, parsed, walk
from tinychat import VOCAB, make_model, make_tokenizer

import specdec
from specdec.errors import GrammarError
from specdec.grammar.compiler import GrammarCompiler
from specdec.grammar.inputs import Grammar
from specdec.grammar.masks import GrammarProcessor
from specdec.grammar.row import RowGrammar

pytest.importorskip("xgrammar", reason="the second grammar backend, pip install xgrammar, is not installed")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "tone": {"enum": ["warm", "cold", "wärmer"]},
        "s": {"type": "string"},
        "n": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["tone", "s", "n", "list"],
    "additionalProperties": False,
    "$defs": {"x": {"const": [1, "a"]}},
}
GRAMMARS = {
    "schema": Grammar.json_schema(SCHEMA, backend="xgrammar"),
    "spaced": Grammar.json_schema(SCHEMA, is_spaced=True, backend="xgrammar"),
    "json": Grammar.json(backend="xgrammar"),
    "regex": Grammar.regex("(foo|food|bar){1,3}[0-9]{2,4}", backend="xgrammar"),
    "choices": Grammar.choices(["yes", "no", "not now", "日本", "a|b (c)"], backend="xgrammar"),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_states_follow_their_text_and_ends_stand_behind_whole_ones(name: str) -> None:
    start, rng = compiler().start(GRAMMARS[name]), random.Random(0)
    grammar = RowGrammar(start.fork(), 0)
    for _ in range(20):
        tokens = walk(start.fork(), rng, rng.randrange(1, 40), hurry=20)
        state, fresh = grammar.at(tokens), start.fork()
        assert all(map(fresh.accept, tokens))
        assert torch.equal(state.allowed(), fresh.allowed())
        assert state.is_complete == fresh.is_complete
        assert state.forced(5) == fresh.forced(5)
        mask = state.allowed()
        assert bool(mask[END]) == state.is_complete
        assert not mask[END + 1 :].any()
        if tokens[-1] == END:
            assert mask.nonzero().flatten().tolist() == [END]
            if name in ("schema", "spaced"):
                jsonschema.validate(parsed(tokens), SCHEMA)


SCHEMAS: list[dict[str, Any]] = [
    {"type": ["integer", "null"]},
    {"enum": [1, "a", None, [2]]},
    {"type": "string"},
    {"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False, "minItems": 2},
    {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "additionalProperties": {"type": "boolean"},
        "required": ["a"],
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:30])
@pytest.mark.parametrize("is_spaced", [False, True])
def test_every_text_that_a_schema_allows_is_valid(schema: dict[str, Any], is_spaced: bool) -> None:
    rng = random.Random(0)
    start = compiler().start(Grammar.json_schema(schema, is_spaced=is_spaced, backend="xgrammar"))
    num_whole = 0
    for _ in range(20):
        tokens = walk(start.fork(), rng, 120)
        if tokens[-1] == END:
            num_whole += 1
            jsonschema.validate(parsed(tokens), schema)
    assert num_whole >= 3


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.json_schema({"type": "array", "uniqueItems": True}, backend="xgrammar"), "xgrammar does not enforce.*uniqueItems"),
        (Grammar.json_schema({"type": "string", "maxLength": 2}, backend="xgrammar"), "xgrammar does not enforce.*maxLength"),
        (Grammar.regex("(a|b", backend="xgrammar"), "xgrammar cannot use this grammar"),
    ],
)  # fmt: skip
def test_what_is_not_enforced_or_damaged_is_refused(grammar: Grammar, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        compiler().start(grammar)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("drafter", ["none", "auto", "grammar"])
def test_greedy_tokens_equal_transformers_under_the_same_grammar(drafter: str) -> None:
    model, tokenizer = make_model(eos=END), make_tokenizer()
    ids = torch.tensor([tokenizer.encode("abc def abc")])
    options: dict[str, Any] = {"max_new_tokens": 80, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    out = specdec.generate(
        model,
        ids,
        grammar=GRAMMARS["schema"],
        tokenizer=tokenizer,
        drafter=drafter,
        return_dict_in_generate=True,
        **options,
    )
    processor = GrammarProcessor([GrammarCompiler(tokenizer, VOCAB, (END,)).start(GRAMMARS["schema"])], (END,))
    expected = model.generate(ids, logits_processor=[processor], pad_token_id=END, **options)
    assert torch.equal(out.sequences, expected)
    if out.finish_reasons == ("stop",):
        jsonschema.validate(json.loads(tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)), SCHEMA)
