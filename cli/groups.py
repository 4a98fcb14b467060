"""Options that belong together as one parameter of a command: a dataclass, declared once and used by many commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from inspect import Parameter, Signature, get_annotations, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

_METAVARS = {int: "N", float: "X", str: "NAME", Path: "DIR"}


class GroupedCommand(TyperCommand):
    """A command whose help shows each group of options under a heading of its own."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = getattr(parameter, "rich_help_panel", None) or f"{parameter.param_type_name}s".capitalize()
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """``function`` as typer takes it: a parameter that is a dataclass stands for the options that are its fields.

    A field is an option if its annotation is one of typer's, or if its metadata holds a ``help`` (and perhaps a
    ``metavar``). A field that is a dataclass is a group again, with the values of that field's default. The first line
    of a group's docstring is its heading; fields that it inherits stand behind its own, those of a public class under
    that class's heading.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = signature(function).parameters
    options: list[Parameter] = []
    for name, parameter in parameters.items():
        if is_dataclass(hints[name]):
            options += _options(hints[name])
        else:
            options.append(parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY))

    def command(**values: Any) -> None:
        function(**{name: _taken(hints[name], values, name) for name in parameters})

    command.__doc__ = function.__doc__
    command.__annotations__ = {option.name: option.annotation for option in options}
    command.__signature__ = Signature(options)  # type: ignore[attr-defined]
    return command


def _options(group: Any, instance: Any = None) -> Iterator[Parameter]:
    """The options of ``group``, those of groups inside it last; ``instance`` gives their defaults."""
    inner: list[Parameter] = []
    for field, hint in _fields(group):
        default = _default(field) if instance is None else getattr(instance, field.name)
        if is_dataclass(hint):
            inner += _options(hint, default)
        elif (annotation := _annotation(field, hint, _heading(group, field))) is not None:
            yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    yield from inner


def _annotation(field: Field[Any], hint: Any, heading: str) -> Any:
    """The field's annotation for typer; None for a field that is no option."""
    if "help" in field.metadata:
        kind = next(part for part in (hint, *get_args(hint)) if part in (bool, *_METAVARS))
        metavar = field.metadata.get("metavar") or _METAVARS.get(kind)
        info = typer.Option("--" + field.name.replace("_", "-"), metavar=metavar, help=field.metadata["help"])
    else:
        info = next(map(copy, getattr(hint, "__metadata__", ())), None)
    if info is None:
        return None
    info.rich_help_panel = heading
    return Annotated[get_args(hint)[0] if hasattr(hint, "__metadata__") else hint, info]


def _taken(hint: Any, values: dict[str, Any], name: str, instance: Any = None) -> Any:
    """The parameter ``name`` with the command line's ``values``; fields that are no options are as in ``instance``."""
    if not is_dataclass(hint):
        return values[name]
    changes = {
        field.name: _taken(
            inner, values, field.name, _default(field) if instance is None else getattr(instance, field.name)
        )
        for field, inner in _fields(hint)
        if field.name in values or is_dataclass(inner)
    }
    return hint(**changes) if instance is None else replace(instance, **changes)  # type: ignore[operator]


def _fields(group: Any) -> Iterator[tuple[Field[Any], Any]]:
    """The fields that are given at construction with their types, ``group``'s own before those of its bases."""
    hints = get_type_hints(group, include_extras=True)
    own_first = sorted(fields(group), key=lambda field: group.__mro__.index(_owner(group, field)))
    return ((field, hints[field.name]) for field in own_first if field.init)


def _owner(group: Any, field: Field[Any]) -> Any:
    """The class that introduces the field: a subclass may only change its default."""
    return [base for base in group.__mro__ if field.name in get_annotations(base)][-1]


def _heading(group: Any, field: Field[Any]) -> str:
    owner = _owner(group, field)
    described = group if owner.__name__.startswith("_") else owner
    return str(described.__doc__).partition("\n")[0].rstrip(".")


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is MISSING else field.default
