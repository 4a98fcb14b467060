"""An option is written once, in specdec.settings: everything else that lists options is held to it."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

import specdec
from specdec.cli.main import app
from specdec.settings import Settings, meaning

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {option.name: option.default for option in fields(Settings)}


@pytest.mark.parametrize("function", [specdec.generate, specdec.custom_generate], ids=lambda f: f.__name__)
def test_the_library_takes_every_option_with_its_default(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in OPTIONS} == OPTIONS


def test_every_option_is_in_the_docstring_and_in_the_guide() -> None:
    text = inspect.getdoc(specdec.generate) or ""
    guide = (ROOT / "docs" / "library.md").read_text("utf-8")
    assert [name for name in OPTIONS if f"\n    {name}: " not in text] == []
    assert [name for name in OPTIONS if f"| `{name}` |" not in guide] == []


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_the_commands_have_every_option_with_its_meaning(command: str) -> None:
    group: Any = typer.main.get_command(app)
    parameters = group.commands[command].params
    options = {name.removeprefix("--").replace("-", "_"): option for option in parameters for name in option.opts}
    assert set(OPTIONS) <= set(options)
    described = [name for name in OPTIONS if meaning(name) in (options[name].help or "")]
    assert set(OPTIONS) - set(described) == {"drafter"}  # whose help depends on how many the command takes


def test_the_server_has_every_option_that_is_not_a_requests() -> None:
    """Seeds come with the requests, and the engine behind the server does not replay passes."""
    group: Any = typer.main.get_command(app)
    parameters = group.commands["serve"].params
    options = {name.removeprefix("--").replace("-", "_"): option for option in parameters for name in option.opts}
    shared = set(OPTIONS) - {"seed", "cuda_graphs"}
    assert shared <= set(options)
    assert [name for name in shared - {"drafter"} if meaning(name) not in (options[name].help or "")] == []
    assert {name: options[name].default for name in shared - {"accelerate"}} == {
        name: OPTIONS[name] for name in shared - {"accelerate"}
    }
