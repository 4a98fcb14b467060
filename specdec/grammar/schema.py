"""Which JSON schemas a backend enforces: whatever it would pass over in silence is refused by name.

JSON Schema tells readers to ignore keywords that they do not know. Who asks for valid output cannot live with that: a
``uniqueItems`` that nobody enforces, or a misspelt ``minlength``, would make promises that nobody keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from specdec.errors import GrammarError

# Say what a value means and not what it may be; or name parts of the schema.
ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions title description default examples deprecated readOnly writeOnly".split()
)
_ONE = ("additionalProperties", "additionalItems", "items")
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Enforced:
    """What one backend enforces."""

    backend: str
    keywords: frozenset[str]
    formats: frozenset[str]


def check_schema(schema: Any, enforced: Enforced) -> None:
    """Refuse what ``enforced`` does not name.

    Raises:
        GrammarError: names the keyword or the format, and where it stands.
    """
    waiting: list[tuple[str, Any]] = [("#", schema)]
    while waiting:
        place, part = waiting.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, Mapping):
            raise GrammarError(f"{place} must be a schema, an object or true or false, got {part!r}")
        unknown = sorted(set(part) - ANNOTATIONS - enforced.keywords)
        if unknown:
            raise GrammarError(
                f"{enforced.backend} does not enforce the keyword {unknown[0]!r} at {place}, so the output could break "
                "it; leave it out and check it yourself, or write it in other words"
            )
        if "format" in part and part["format"] not in enforced.formats:
            raise GrammarError(
                f"{enforced.backend} does not enforce the format {part['format']!r} at {place}; it knows "
                f"{', '.join(sorted(enforced.formats)) or 'none'}: use a pattern"
            )
        waiting += _parts(place, part)


# llguidance lets every year have a 29th of February.
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_REAL_DATE = f"^(?:[0-9]{{4}}-(?:0[13-9]|1[0-2])|[0-9]{{4}}-02-(?:[01]|2[0-8])|{_LEAP_YEAR}-02-29)"


def with_real_dates(schema: Any) -> Any:
    """``schema``, which was checked, with a pattern beside each format that holds a date: only leap years have Feb 29."""
    if not isinstance(schema, Mapping):
        return schema
    exact = dict(schema)
    for key, value in schema.items():
        if key in _NAMED:
            exact[key] = {name: with_real_dates(part) for name, part in value.items()}
        elif key in _MANY and isinstance(value, list):
            exact[key] = [with_real_dates(part) for part in value]
        elif key in _ONE:
            exact[key] = with_real_dates(value)
    if schema.get("format") in ("date", "date-time"):
        exact["allOf"] = [*exact.get("allOf", ()), {"pattern": _REAL_DATE}]
    return exact


def _parts(place: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside ``schema``, each with its place."""
    for key, value in schema.items():
        if key in _NAMED:
            if not isinstance(value, Mapping):
                raise GrammarError(f"{place}/{key} must be an object of schemas, got {value!r}")
            yield from ((f"{place}/{key}/{name}", part) for name, part in value.items())
        elif key in _MANY and isinstance(value, list):
            yield from ((f"{place}/{key}/{i}", part) for i, part in enumerate(value))
        elif key in _ONE:
            yield f"{place}/{key}", value
