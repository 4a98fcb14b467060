"""What a text may be asked to keep to: a JSON schema, a regular expression, a Lark grammar, choices, any JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from specdec.checks import shown
from specdec.errors import GrammarError

DEFAULT_BACKEND = "llguidance"
BACKENDS = (DEFAULT_BACKEND, "xgrammar")
MAX_CHOICES = 50_000


class Kind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@runtime_checkable
class HasSchema(Protocol):
    """A class that knows its JSON schema, such as a model of pydantic."""

    def model_json_schema(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must match from its first token to its last; made by the class methods. Knows no tokenizer.

    ``is_spaced`` is of JSON: white space is free between its tokens. Otherwise it is written as by json.dumps, in one
    line with ``", "`` and ``": "``: then most of its punctuation is certain and costs no pass, and no model can lose
    itself in blanks.
    """

    kind: Kind
    text: str  # the schema as JSON, the expression, or the rules
    is_spaced: bool = False
    backend: str = DEFAULT_BACKEND

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {shown(self.backend)}")

    @classmethod
    def json_schema(
        cls,
        schema: Mapping[str, Any] | bool | str | PathLike[str] | type,
        *,
        is_spaced: bool = False,
        backend: str = DEFAULT_BACKEND,
    ) -> Grammar:
        """JSON that a schema allows.

        Args:
            schema: a dict or bool, a pydantic model, the path of a JSON file, or JSON text.
            is_spaced: allow white space anywhere between the tokens of JSON.
            backend: "llguidance" or "xgrammar".

        Raises:
            GrammarError: it is no JSON, or no schema.
        """
        if isinstance(schema, type) and isinstance(schema, HasSchema):
            return cls(Kind.JSON_SCHEMA, json.dumps(schema.model_json_schema()), is_spaced, backend)
        if isinstance(schema, str | PathLike):
            schema = _read_json(schema)
        if not isinstance(schema, Mapping | bool):
            raise GrammarError(
                "a JSON schema is an object or true or false, given as a dict, a pydantic model, a file or its text; got "
                f"{shown(schema)}"
            )
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"a JSON schema must hold JSON and nothing else: {error}") from None
        return cls(Kind.JSON_SCHEMA, text, is_spaced, backend)

    @classmethod
    def json(cls, *, is_spaced: bool = False, backend: str = DEFAULT_BACKEND) -> Grammar:
        """Any JSON value."""
        return cls.json_schema(True, is_spaced=is_spaced, backend=backend)

    @classmethod
    def regex(cls, pattern: str, *, backend: str = DEFAULT_BACKEND) -> Grammar:
        r"""Text that ``pattern`` matches from end to end: no look-around, no back-references; ``\d`` is any digit of Unicode."""
        if not isinstance(pattern, str):
            raise GrammarError(f"a regular expression is text, got {shown(pattern)}")
        return cls(Kind.REGEX, pattern, backend=backend)

    @classmethod
    def lark(cls, rules: str | PathLike[str]) -> Grammar:
        """Text that the rule ``start`` of a grammar in Lark's notation derives; a Path is read. llguidance alone knows it.

        Raises:
            GrammarError: the file cannot be read.
        """
        text = _read(rules) if isinstance(rules, PathLike) else rules
        if not isinstance(text, str):
            raise GrammarError(f"a Lark grammar is text or the path of a file, got {shown(text)}")
        return cls(Kind.LARK, text)

    @classmethod
    def choices(cls, choices: Sequence[str], *, backend: str = DEFAULT_BACKEND) -> Grammar:
        """One of ``choices``, character by character.

        Raises:
            GrammarError: there is none, one is no text, or there are more than ``MAX_CHOICES``.
        """
        if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
            raise GrammarError(f"choices are a list of texts, got {shown(choices)}")
        if not 0 < len(choices) <= MAX_CHOICES:
            raise GrammarError(
                f"there must be 1 to {MAX_CHOICES} choices, got {len(choices)}; use a regex or a grammar"
            )
        pattern = "|".join(_literal(choice) for choice in dict.fromkeys(choices))
        return cls(Kind.REGEX, f"(?:{pattern})", backend=backend)


def _literal(text: str) -> str:
    """The regular expression of ``text``, in a notation that every dialect reads alike."""
    return "".join(c if c.isalnum() else rf"\x{ord(c):02x}" if ord(c) < 128 else c for c in text)


def _read_json(schema: str | PathLike[str]) -> Any:
    is_text = isinstance(schema, str) and re.match(r"\s*(\{|true\b|false\b)", schema)
    text, what = (str(schema), "the JSON schema") if is_text else (_read(schema), str(schema))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{what} is no JSON: {error}") from None


def _read(path: str | PathLike[str]) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise GrammarError(f"cannot read {path}: {reason}") from None
