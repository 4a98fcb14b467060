"""Options that are declared as fields of a dataclass: what a command takes, what it is given, and what its help shows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from specdec.cli.groups import GroupedCommand, grouped


@dataclass(frozen=True)
class Fit:
    """How to fit."""

    rate: float = field(default=0.5, metadata={"help": "The rate."})
    momentum: float = 0.9  # no option


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine.

    Not a part of the heading.
    """

    threads: Annotated[int | None, typer.Option(metavar="N", help="The threads.")] = None


@dataclass(frozen=True, kw_only=True)
class Recipe(Machine):
    """The recipe."""

    size: int = field(default=3, metadata={"help": "The size."})
    start: str | None = field(default=None, metadata={"help": "The start.", "metavar": "DIR"})
    fit: Fit = field(default_factory=lambda: Fit(rate=0.25, momentum=0.1))

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@pytest.fixture
def taken() -> list[Any]:
    return []


@pytest.fixture
def app(taken: list[Any]) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    @app.command(cls=GroupedCommand)
    @grouped
    def command(name: str, recipe: Recipe, loud: Annotated[bool, typer.Option("--loud", help="Loud.")] = False) -> None:
        """What it does."""
        taken.extend([name, recipe, loud])

    return app


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("x", ["x", Recipe(fit=Fit(0.25, 0.1)), False]),
        ("x --size 5 --threads 2 --loud", ["x", Recipe(size=5, threads=2, fit=Fit(0.25, 0.1)), True]),
        ("x --rate 0.75 --start d", ["x", Recipe(start="d", fit=Fit(0.75, 0.1)), False]),
    ],
)
def test_a_command_gets_its_groups(app: typer.Typer, taken: list[Any], words: str, expected: list[Any]) -> None:
    """What is no option is as in the default of the group around it, not as in the class."""
    ran = CliRunner().invoke(app, words.split())
    assert ran.exit_code == 0, ran.output
    assert taken == expected


def test_a_group_refuses_what_its_class_refuses(app: typer.Typer) -> None:
    ran = CliRunner().invoke(app, ["x", "--size", "0"])
    assert str(ran.exception) == "size must be at least 1, got 0"


def test_the_help_shows_groups_with_their_own_options_first(app: typer.Typer) -> None:
    said = CliRunner().invoke(app, ["--help"]).output
    lines = re.findall(r"^(\S.*:|  (?:--|-h|name)[\w-]*)", said, re.MULTILINE)
    order = [line.strip() for line in lines if not line.startswith("Usage")]
    assert order[:2] == ["Arguments:", "name"]
    groups = ["The recipe:", "--size", "--start", "The machine:", "--threads", "How to fit:", "--rate"]
    assert [line for line in order if line in groups] == groups
    assert "momentum" not in said
    assert re.search(r"--rate X .*\[default: 0.25\]", said)
    assert "--start DIR" in said
