"""Drafters, and the table of their names. Another package adds its own through the entry-point group of that name."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from os import PathLike
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # names alone must not wait for torch
    from specdec.interfaces import DraftContext, Drafter

ENTRY_POINTS = "specdec.drafters"

# Name -> module with a function build(context) -> Drafter, imported when asked for: every file of this folder is one.
DRAFTERS: dict[str, str] = {
    module.name: f"{__name__}.{module.name}" for module in iter_modules(__path__) if not module.ispkg
}

Build = Callable[["DraftContext"], "Drafter"]

# option=value, and the comma behind it: a quoted string as in Python, or anything up to the next comma.
_OPTION = re.compile(
    r"""\s*([^=,\s]+)\s*=\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|(?!["'])[^,]*?)\s*(?:,|\Z)""", re.DOTALL
)


def drafter_names() -> list[str]:
    """All names: our own, then those of other installed packages."""
    return [*DRAFTERS, *(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in DRAFTERS)]


def tuned_file(drafter: str | PathLike[str]) -> Path | None:
    """The file of ``specdec tune`` that ``drafter`` is, or None: then it is the text of a drafter, or of nothing known.

    A path object is always such a file. Text is the name of a drafter, alone or with options behind a colon, before it
    is a file, which exists or at least ends in .json: ``model:shape=best.json`` is a drafter, ``C:/best.json`` a file.
    """
    if not isinstance(drafter, str):
        return Path(drafter).expanduser()
    name, colon, rest = drafter.partition(":")
    if name in drafter_names():
        return None
    path = Path(drafter).expanduser()
    is_misspelt = colon and "=" in rest and len(name) > 1 and "/" not in name and "\\" not in name
    return path if path.is_file() or (path.suffix.lower() == ".json" and not is_misspelt) else None


def parse_drafter(text: str) -> tuple[str, dict[str, Any]]:
    """The name and options of "name" or "name:option=value,option=value".

    A value is read as a Python literal, and as text if it is none. One that holds a comma, or text that would be read
    as a number, stands in quotes: ``eagle:path="a,b"``.

    Raises:
        ValueError: unknown name, or options of another form.
    """
    name, _, rest = text.partition(":")
    _check_name(name)
    options: dict[str, Any] = {}
    place = 0
    while place < len(rest):
        match = _OPTION.match(rest, place)
        if match is None:
            raise ValueError(
                "drafter options are written name:option=value,option=value, values with a comma in quotes "
                f'(path="a,b"); got {rest[place:]!r} in {text!r}'
            )
        key, value = match.groups()
        if key in options:
            raise ValueError(f"drafter option {key} appears twice in {text!r}")
        options[key] = _read(value)
        place = match.end()
    return name, options


def format_drafter(name: str, options: Mapping[str, Any]) -> str:
    """The text that ``parse_drafter`` reads as ``name`` and ``options``, values being text, numbers, booleans or None."""
    written = ",".join(f"{key}={_written(value)}" for key, value in options.items())
    return f"{name}:{written}" if written else name


def auto_drafter(has_draft_model: bool) -> str:
    """What drafter ``auto`` stands for: a draft model if there is one, else the best of what needs no training."""
    return "model" if has_draft_model else "hybrid"


def resolved_drafter(text: str, has_draft_model: bool) -> str:
    """The drafter that ``text`` names, with ``auto`` replaced by what it stands for."""
    name, colon, rest = text.partition(":")
    return (auto_drafter(has_draft_model) if name == "auto" else name) + colon + rest


def make_drafter(text: str, context: DraftContext) -> Drafter:
    """The drafter that ``text`` names, for the target and verifier of ``context``.

    Raises:
        ValueError: unknown name or option, or something that this drafter needs is missing.
    """
    name, options = parse_drafter(text)
    return build_drafter(name, replace(context, options=options))


def build_drafter(name: str, context: DraftContext) -> Drafter:
    """The drafter called ``name``, with the options in ``context``.

    Raises:
        ValueError: as for ``make_drafter``.
    """
    build = _builder(name)
    try:
        return build(context)
    except TypeError as error:
        if not context.options:
            raise
        description = (inspect.getdoc(build) or "see its documentation").splitlines()[0]
        raise ValueError(
            f"drafter {name!r} does not take these options: {context.options} ({error}). {description}"
        ) from error


def _check_name(name: str) -> None:
    if name not in drafter_names():
        hint = "; settings of specdec tune are passed as --config on the command line" if name.endswith(".json") else ""
        raise ValueError(f"no drafter is called {name!r}; choose one of {', '.join(drafter_names())}{hint}")


def _read(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _written(value: Any) -> str:
    text = str(value)
    whole = _OPTION.fullmatch(f"x={text}")
    return text if whole and whole[2] == text and _read(text) == value else json.dumps(text, ensure_ascii=False)


def _builder(name: str) -> Build:
    _check_name(name)
    if name in DRAFTERS:
        return import_module(DRAFTERS[name]).build  # type: ignore[no-any-return]
    (point, *_) = entry_points(group=ENTRY_POINTS, name=name)
    return point.load()  # type: ignore[no-any-return]
