"""xgrammar behind our protocol: a second library for JSON schemas and regular expressions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import GrammarError
from specdec.grammar.inputs import Grammar, Kind
from specdec.grammar.options import longest
from specdec.grammar.schema import Enforced, check_schema

# Of what it reads, only what it was seen to enforce (tests/grammar): other keywords it passes over.
ENFORCED = Enforced(
    "xgrammar",
    frozenset(
        "$ref type enum const anyOf properties additionalProperties required items prefixItems minItems maxItems".split()
    ),
    frozenset(),
)


@dataclass(slots=True)
class XgrammarState:
    """One matcher, which never sees end tokens."""

    matcher: Any
    ends: tuple[int, ...]
    vocab_size: int
    tokenizer: Any
    special: tuple[int, ...]  # tokens that are no text: xgrammar would write them into strings
    num_ended: int = 0

    @property
    def is_complete(self) -> bool:
        return bool(self.matcher.is_completed())

    def allowed(self) -> Tensor:
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        if not self.num_ended:
            words = torch.full((1, -(-self.vocab_size // 32)), -1, dtype=torch.int32)
            self.matcher.fill_next_token_bitmask(words)
            bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")[: self.vocab_size]
            mask = torch.from_numpy(bits.astype(bool))
            mask[list(self.special)] = False
        mask[list(self.ends)] = self.is_complete
        return mask

    def accept(self, token: int) -> bool:
        if token in self.ends:
            is_end = self.is_complete
            self.num_ended += is_end
            return is_end
        if self.num_ended or token in self.special or not 0 <= token < self.vocab_size:
            return False
        return bool(self.matcher.accept_token(token))

    def rollback(self, num_tokens: int) -> None:
        num_ends = min(num_tokens, self.num_ended)
        self.num_ended -= num_ends
        if num_tokens > num_ends:
            self.matcher.rollback(num_tokens - num_ends)

    def fork(self) -> XgrammarState:
        return replace(self, matcher=self.matcher.fork())

    def forced(self, limit: int) -> list[int]:
        if self.num_ended:
            return []
        text = self.matcher.find_jump_forward_string()
        found: list[int] = []
        for token in self.tokenizer.encode(text, add_special_tokens=False)[:limit] if text else []:
            if not self.accept(token):
                break
            found.append(token)
        if len(found) < limit and (not text or found) and self.is_complete:
            only = self.allowed().nonzero().flatten().tolist()
            found += only if len(only) == 1 and self.accept(only[0]) else []
        self.rollback(len(found))
        return found

    def options(self, most: int) -> list[int]:
        return [] if self.num_ended else longest(self.allowed(), most, self.tokenizer.convert_ids_to_tokens)


@dataclass(frozen=True, slots=True)
class XgrammarBackend:
    """Compiles grammars for one vocabulary."""

    compiler: Any
    ends: tuple[int, ...]
    vocab_size: int
    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, ends: Sequence[int]) -> XgrammarBackend:
        """For a tokenizer of transformers.

        Raises:
            GrammarError: xgrammar cannot read it.
        """
        import xgrammar

        try:
            info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=list(ends))
        except (ValueError, RuntimeError) as error:
            raise GrammarError(f"xgrammar cannot read this tokenizer: {_last_line(error)}") from None
        return cls(xgrammar.GrammarCompiler(info), tuple(ends), vocab_size, tokenizer)

    def compile(self, grammar: Grammar) -> XgrammarState:
        """The state of an empty text.

        Raises:
            GrammarError: what is wrong with ``grammar``.
        """
        import xgrammar

        try:
            compiled = self._compiled(grammar)
        except RuntimeError as error:
            raise GrammarError(f"xgrammar cannot use this grammar: {_last_line(error)}") from None
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=False)
        known = self.tokenizer.added_tokens_decoder.items()
        special = tuple(token for token, added in known if added.special and token < self.vocab_size)
        return XgrammarState(matcher, self.ends, self.vocab_size, self.tokenizer, special)

    def _compiled(self, grammar: Grammar) -> Any:
        if grammar.kind is Kind.REGEX:
            return self.compiler.compile_regex(grammar.text)
        if grammar.kind is Kind.LARK:
            raise GrammarError("xgrammar does not read Lark grammars; use the backend 'llguidance'")
        schema = json.loads(grammar.text)
        check_schema(schema, ENFORCED)
        if schema is False:
            raise GrammarError("the JSON schema false allows nothing; use true for any JSON")
        layout: dict[str, Any] = {"any_whitespace": grammar.is_spaced}
        if not grammar.is_spaced:
            layout["separators"] = (", ", ": ")
        text = "{}" if schema is True else grammar.text
        return self.compiler.compile_json_schema(text, strict_mode=False, **layout)


def _last_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
