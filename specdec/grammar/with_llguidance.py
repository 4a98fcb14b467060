"""llguidance behind our protocol. Its matcher never raises: it enters an error state, so it is asked after every call.

Where the text is certain llguidance allows only the tokens that its tokenizer writes it with. That is part of the
distribution that plain constrained decoding has, and so of ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import GrammarError
from specdec.grammar.inputs import Grammar, Kind
from specdec.grammar.options import longest
from specdec.grammar.schema import Enforced, check_schema, with_real_dates

ENFORCED = Enforced(
    "llguidance",
    frozenset(
        "$ref type enum const allOf anyOf oneOf properties patternProperties additionalProperties required "
        "minProperties maxProperties items prefixItems additionalItems minItems maxItems minLength maxLength pattern "
        "format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
    ),
    frozenset("date-time time date duration email hostname ipv4 ipv6 uri uuid".split()),
)


@dataclass(slots=True)
class LlguidanceState:
    """One matcher, and how many end tokens were accepted behind its text: those it never sees."""

    matcher: Any
    ends: tuple[int, ...]
    tokenizer: Any  # llguidance's own
    _num_ended: int = 0

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.vocab_size)

    @property
    def is_complete(self) -> bool:
        is_accepting = bool(self.matcher.is_accepting())
        self._check()
        return is_accepting

    def allowed(self) -> Tensor:
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        if not self._num_ended:
            # In an error state the matcher would allow the end of the text.
            bias = self.matcher.compute_logit_bias()
            self._check()
            mask = torch.from_numpy(np.frombuffer(bias, np.uint8) != 0)
        mask[list(self.ends)] = self.is_complete
        return mask

    def accept(self, token: int) -> bool:
        if token in self.ends:
            is_end = self.is_complete
            self._num_ended += is_end
            return is_end
        if self._num_ended or not 0 <= token < self.vocab_size:
            return False
        num_taken = self.matcher.try_consume_tokens([token])
        self._check()
        return bool(num_taken)

    def rollback(self, num_tokens: int) -> None:
        num_ends = min(num_tokens, self._num_ended)
        self._num_ended -= num_ends
        if num_tokens > num_ends:
            self.matcher.rollback(num_tokens - num_ends)
            self._check()

    def fork(self) -> LlguidanceState:
        return LlguidanceState(self.matcher.deep_copy(), self.ends, self.tokenizer, self._num_ended)

    def forced(self, limit: int) -> list[int]:
        found: list[int] = []
        waiting: list[int] = []
        while len(found) < limit:
            waiting = waiting or self._forced_step()
            if not waiting or not self.accept(waiting[0]):
                break
            found.append(waiting.pop(0))
        self.rollback(len(found))
        return found

    def options(self, most: int) -> list[int]:
        return (
            [] if self._num_ended else longest(self.allowed(), most, lambda token: self.tokenizer.decode_bytes([token]))
        )

    def _forced_step(self) -> list[int]:
        """Tokens that follow for certain; [] if there is a choice."""
        if self._num_ended:
            return []
        tokens: list[int] = self.matcher.compute_ff_tokens()
        # One token alone means that all bytes of it are certain, or the end.
        if not tokens and (self.matcher.is_stopped() or self.matcher.compute_ff_bytes()):
            only = self.allowed().nonzero().flatten().tolist()
            tokens = only if len(only) == 1 else []
        self._check()
        return tokens

    def _check(self) -> None:
        if self.matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed any further: {first_lines(self.matcher.get_error())}")


@dataclass(frozen=True, slots=True)
class LlguidanceBackend:
    """Compiles grammars for one vocabulary."""

    tokenizer: Any  # llguidance's own
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, ends: Sequence[int]) -> LlguidanceBackend:
        """For a fast tokenizer of transformers.

        Raises:
            GrammarError: it is none, or one that llguidance cannot read.
        """
        from llguidance import LLTokenizer
        from transformers import PreTrainedTokenizerFast

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise GrammarError(
                f"a grammar needs a fast tokenizer of transformers, got {type(tokenizer).__name__}: load it with "
                "AutoTokenizer.from_pretrained(...) or specdec.load_tokenizer(...)"
            )
        plain = copy(tokenizer.backend_tokenizer)
        plain.no_padding()
        plain.no_truncation()
        try:
            return cls(LLTokenizer(plain.to_str(), n_vocab=vocab_size, eos_token=list(ends)), tuple(ends))
        except (ValueError, RuntimeError) as error:
            raise GrammarError(f"llguidance cannot read this tokenizer: {first_lines(str(error))}") from None

    def compile(self, grammar: Grammar) -> LlguidanceState:
        """The state of an empty text.

        Raises:
            GrammarError: what is wrong with ``grammar``.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokenizer, _source(grammar), log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the {_NAMES[grammar.kind]} cannot be used: {first_lines(matcher.get_error())}")
        return LlguidanceState(matcher, self.ends, self.tokenizer)


_NAMES = {Kind.JSON_SCHEMA: "JSON schema", Kind.REGEX: "regular expression", Kind.LARK: "Lark grammar"}


def _source(grammar: Grammar) -> str:
    """``grammar`` in llguidance's own notation."""
    from llguidance import LLMatcher

    source: str
    if grammar.kind is Kind.REGEX:
        source = LLMatcher.grammar_from_regex(grammar.text)
    elif grammar.kind is Kind.LARK:
        source = LLMatcher.grammar_from_lark(grammar.text)
    else:
        schema = json.loads(grammar.text)
        check_schema(schema, ENFORCED)
        if schema is False:
            raise GrammarError("the JSON schema false allows nothing; use true for any JSON")
        options: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "whitespace_flexible": grammar.is_spaced}
        if not grammar.is_spaced:
            options |= {"item_separator": ", ", "key_separator": ": "}
        exact = {} if schema is True else with_real_dates(schema)
        source = LLMatcher.grammar_from_json_schema(exact, overrides=options)
    return source


def first_lines(text: str, most: int = 300) -> str:
    """What llguidance says of an error, without the state that it shows behind it."""
    told = text.split("<state>")[0].split("<backtrace>")[0]
    return " ".join(told.split())[:most]
