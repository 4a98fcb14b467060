"""``specdec report``: what was measured, as one HTML file."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: specdec report bench.jsonl bench.json --output report.html"


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Traces (.jsonl) and results (.json) of bench and tune.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Make a page of what was measured: which method is fastest, how sure that is, and what happened at every step.

    The file holds everything and needs no network. Runs under different conditions get chapters of their own.
    """
    from specdec.analysis.report import build
    from specdec.records.files import check_writable, write_text

    output = output.expanduser()
    if output.resolve() in [run.expanduser().resolve() for run in runs]:
        raise ValueError(f"--output {output} is one of the runs; name another file")
    check_writable(output, "--output")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        page = build([run.expanduser() for run in runs])
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    write_text(output, page)
    print(f"written to {output} ({len(page) / 1e6:.1f} MB)")
