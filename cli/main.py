"""The command ``specdec``. Starts without torch: every command imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from specdec import __version__
from specdec.cli import bench, doctor, export, figures, generate, models, report, serve, train, tune
from specdec.cli.groups import GroupedCommand
from specdec.errors import SpecdecError

app = typer.Typer(
    help="Speculative decoding for any Hugging Face causal language model: the same tokens, sooner.",
    epilog="Example: specdec bench --limit 8 --max-new-tokens 48",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate", cls=GroupedCommand, epilog=generate.EXAMPLE)(generate.generate)
app.command("bench", cls=GroupedCommand, epilog=bench.EXAMPLE)(bench.bench)
app.command("serve", cls=GroupedCommand, epilog=serve.EXAMPLE)(serve.serve)
app.command("tune", cls=GroupedCommand, epilog=tune.EXAMPLE)(tune.tune)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.command("figures", epilog=figures.EXAMPLE)(figures.figures)
app.add_typer(train.app, name="train")
app.command("export", epilog=export.EXAMPLE)(export.export)
app.add_typer(models.app, name="models")
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"specdec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """The console script. Status 0: fine; 1: a measurement that failed its check; 2: bad input, told in one line;
    3: a fault of ours; 130: interrupted. SPECDEC_DEBUG=1 shows the traceback.
    """
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("SPECDEC_DEBUG") == "1":
            raise
        _report(error)


def _report(error: Exception) -> None:
    message = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, ValueError | OSError | SpecdecError):
        _fail(message or kind, 2)
    if "OutOfMemory" in kind or isinstance(error, MemoryError):
        _fail(f"out of memory; use a smaller model, shorter prompts or a smaller batch ({message or kind})", 2)
    _fail(f"unexpected {kind}: {message} (SPECDEC_DEBUG=1 shows where; please report it)", 3)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
