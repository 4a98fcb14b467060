"""Drafters, and the table of their names. Another package adds its own through the entry-point group of that name."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from specdec.interfaces import DraftContext, Drafter

ENTRY_POINTS = "specdec.drafters"

# Name -> module with a function build(context) -> Drafter; imported when asked for.
DRAFTERS: dict[str, str] = {
    "none": "specdec.drafters.none",
    "ngram": "specdec.drafters.ngram",
    "suffix": "specdec.drafters.suffix",
    "recycling": "specdec.drafters.recycling",
    "model": "specdec.drafters.model",
    "medusa": "specdec.drafters.medusa",
    "eagle": "specdec.drafters.eagle",
    "hybrid": "specdec.drafters.hybrid",
}

Build = Callable[[DraftContext], Drafter]


def drafter_names() -> list[str]:
    """All names: our own, then those of other installed packages."""
    return [*DRAFTERS, *(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in DRAFTERS)]


def parse_drafter(text: str) -> tuple[str, dict[str, Any]]:
    """The name and options of "name" or "name:option=value,option=value".

    Raises:
        ValueError: unknown name, or options of another form.
    """
    name, _, rest = text.partition(":")
    if name not in drafter_names():
        raise ValueError(f"no drafter is called {name!r}; choose one of {', '.join(drafter_names())}")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"drafter options are written name:option=value,option=value; got {part!r} in {text!r}")
        try:
            options[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.strip()] = value
    return name, options


def make_drafter(text: str, context: DraftContext) -> Drafter:
    """The drafter that ``text`` names, for the target and verifier of ``context``.

    Raises:
        ValueError: unknown name or option, or something that this drafter needs is missing.
    """
    name, options = parse_drafter(text)
    build = _builder(name)
    try:
        return build(replace(context, options=options))
    except TypeError as error:
        if not options:
            raise
        known = (inspect.getdoc(build) or "see its documentation").splitlines()[0]
        raise ValueError(f"drafter {name!r} does not take these options: {options} ({error}). {known}") from error


def _builder(name: str) -> Build:
    if name in DRAFTERS:
        return import_module(DRAFTERS[name]).build  # type: ignore[no-any-return]
    (point, *_) = entry_points(group=ENTRY_POINTS, name=name)
    return point.load()  # type: ignore[no-any-return]
