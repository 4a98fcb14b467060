"""The options of ``specdec generate`` that say what a text must match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from specdec.grammar.inputs import Grammar


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What the text must match.

    Raises:
        ValueError: more than one of them.
    """

    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE.json", help="Write JSON that this schema allows.")
    ] = None
    regex: Annotated[
        str | None,
        typer.Option("--regex", metavar="PATTERN", help="Write text that this regular expression matches whole."),
    ] = None
    grammar: Annotated[
        Path | None, typer.Option("--grammar", metavar="FILE.lark", help="Write text that this Lark grammar derives.")
    ] = None
    choices: Annotated[str | None, typer.Option("--choices", metavar="A,B,...", help="Write one of these.")] = None

    def __post_init__(self) -> None:
        given = {
            "--json-schema": self.json_schema,
            "--regex": self.regex,
            "--grammar": self.grammar,
            "--choices": self.choices,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} cannot both hold: choose one of them")

    def read(self) -> Grammar | None:
        """The grammar that was given; None: the text is free.

        Raises:
            ValueError: it cannot be read, or is damaged.
        """
        from specdec.grammar.inputs import Grammar

        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema)
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.grammar is not None:
            return Grammar.lark(self.grammar)
        return None if self.choices is None else Grammar.choices(self.choices.split(","))
