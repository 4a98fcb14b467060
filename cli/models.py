"""``specdec models``: the built-in models, what is fetched, and where it lies."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from specdec.errors import ModelUnavailableError
from specdec.hub.catalog import DEFAULT_MODEL, is_fetched, known_models, model_path
from specdec.hub.fetch import fetch_model

app = typer.Typer(
    help="List, fetch and find the built-in models.",
    epilog="Example: specdec models fetch smollm2-135m",
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A built-in model.")]


@app.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_models()


@app.command("list")
def list_models() -> None:
    """List the built-in models and where they lie."""
    for builtin in known_models():
        state = f"fetched, in {model_path(builtin.name)}" if is_fetched(builtin.name) else "not fetched"
        default = ", the default" if builtin.name == DEFAULT_MODEL else ""
        typer.echo(f"{builtin.name}: {state}")
        typer.echo(
            f"  {builtin.description}; {builtin.licence}; {builtin.download_mb} MB to download, {builtin.disk_mb} MB on disk{default}"
        )
    typer.echo("Besides these, any folder or Hugging Face Hub id of a causal language model can be named.")


@app.command("fetch", epilog="Example: specdec models fetch smollm2-135m")
def fetch(name: Name = DEFAULT_MODEL) -> None:
    """Fetch a built-in model unless it is there, and print its folder."""
    typer.echo(fetch_model(name, progress=lambda line: print(line, file=sys.stderr, flush=True)))


@app.command("path", epilog="Example: ls $(specdec models path smollm2-135m)")
def path(name: Name = DEFAULT_MODEL) -> None:
    """Print the folder of a built-in model that was fetched."""
    folder = model_path(name)
    if not is_fetched(name):
        raise ModelUnavailableError(f"{name} is not fetched yet; run: specdec models fetch {name}")
    typer.echo(folder)
