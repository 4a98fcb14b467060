"""Grammars, and random texts that they allow, over a tokenizer with a token for each byte and a few longer ones."""

from __future__ import annotations

import random
from typing import Any

from tinychat import VOCAB, make_tokenizer
from transformers import PreTrainedTokenizerFast

from specdec.constraints import GrammarState
from specdec.grammar.compiler import GrammarCompiler
from specdec.grammar.inputs import Grammar

END = 256  # of tinychat's tokenizer
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tone": {"enum": ["warm", "cold", "wärmer", 'a "quote"\n']},
        "tags": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tone"],
    "additionalProperties": False,
}
GRAMMARS = {
    "person": Grammar.json_schema(PERSON),
    "spaced": Grammar.json_schema(PERSON, is_spaced=True),
    "json": Grammar.json(),
    "regex": Grammar.regex("(foo|food|bar){1,3}[0-9]{2,4}(é|ü)?"),
    "lark": Grammar.lark('start: e\ne: NUM | "(" e "+" e ")"\nNUM: /[0-9]+/'),
    "choices": Grammar.choices(["yes", "no", "not now", "日本", "a|b (c)"]),
}


def compiler(tokenizer: PreTrainedTokenizerFast | None = None, ends: tuple[int, ...] = (END,)) -> GrammarCompiler:
    return GrammarCompiler(tokenizer or make_tokenizer(), VOCAB + 5, ends)  # some columns of the logits have no token


def walk(state: GrammarState, rng: random.Random, longest: int, *, hurry: int = 10) -> list[int]:
    """A random text, its end included if it comes to one; from ``hurry`` tokens on it ends where it can, and repeats
    the rarest tokens, which close strings and lists.
    """
    tokens: list[int] = []
    while len(tokens) < longest and END not in tokens[-1:]:
        choices: list[int] = state.allowed().nonzero().flatten().tolist()
        assert choices
        if len(tokens) >= hurry:
            closing = [t for t in choices if t == END] or [t for t in choices if chr(_byte(t)) in '"}]'] or choices
            choices = closing
        tokens.append(rng.choice(choices))
        assert state.accept(tokens[-1])
    return tokens


_BYTES: dict[int, int] = {}


def _byte(token: int) -> int:
    if not _BYTES:
        letters = make_tokenizer().convert_ids_to_tokens(range(256))
        _BYTES.update({i: ord(letter) if len(letter) == 1 else 0 for i, letter in enumerate(letters)})
    return _BYTES.get(token, 0)


def parsed(tokens: list[int]) -> Any:
    import json

    return json.loads(make_tokenizer().decode(tokens, skip_special_tokens=True))
