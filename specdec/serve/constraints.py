"""The grammar that a request asks its answer to follow, whichever of the usual fields it uses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from specdec.serve.bodies import Body
from specdec.serve.errors import bad

_OBJECT = {"type": "object"}  # what "json_object" asks for


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a field asks of the answer."""

    field: str
    kind: str
    value: Any

    def build(self) -> Any:
        """What ``RequestSettings.grammar`` takes. Raises ApiError."""
        return _build(self.field, self.kind, self.value)


def constraint_of(body: Body) -> Constraint | None:
    """What ``body`` asks of its answer; None: it is free.

    Raises:
        ApiError: two constraints at once, or one that says nothing.
    """
    found = {name: wanted for name, wanted in _wanted(body).items() if wanted[1] is not None}
    if len(found) > 1:
        raise bad(list(found)[1], f"{' and '.join(found)} both constrain the answer; give one of them")
    return next((Constraint(name, kind, value) for name, (kind, value) in found.items()), None)


def _wanted(body: Body) -> dict[str, tuple[str, Any]]:
    """For each field its kind of grammar and what it asks for, None if it is not there."""
    wanted: dict[str, tuple[str, Any]] = {
        "guided_json": ("json_schema", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "guided_choice": ("choices", body.guided_choice),
        "guided_grammar": ("lark", body.guided_grammar),
    }
    if (outputs := body.structured_outputs) is not None:
        wanted |= {
            "structured_outputs.json": ("json_schema", outputs.json_),
            "structured_outputs.json_object": ("json_schema", _OBJECT if outputs.json_object else None),
            "structured_outputs.regex": ("regex", outputs.regex),
            "structured_outputs.choice": ("choices", outputs.choice),
            "structured_outputs.grammar": ("lark", outputs.grammar),
        }
        if all(value is None for _, value in wanted.values()):
            raise bad("structured_outputs", "structured_outputs names no constraint: json, regex, choice or grammar")
    if (form := body.response_format) is not None and form.type == "json_object":
        wanted["response_format"] = ("json_schema", _OBJECT)
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise bad("response_format.json_schema.schema", "response_format.json_schema needs a schema")
        wanted["response_format"] = ("json_schema", form.json_schema.schema_)
    return wanted


def _build(name: str, kind: str, value: Any) -> Any:
    try:
        from specdec import Grammar
    except ImportError:
        raise bad(name, f"{name}: this server cannot constrain answers; install specdec-toolkit[grammar]") from None
    try:
        if kind == "json_schema":
            return Grammar.json_schema(_schema(name, value))
        make = {"regex": Grammar.regex, "choices": Grammar.choices, "lark": Grammar.lark}[kind]
        return make(value)
    except (ValueError, TypeError) as error:
        raise bad(name, f"{name}: {error}") from None


def _schema(name: str, value: Any) -> Any:
    """A schema that was sent as an object or as text. Never a string: the library takes one for the name of a file."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise bad(name, f"{name} is no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise bad(name, f"{name} must be a JSON schema, an object, got {type(schema).__name__}")
    return schema
