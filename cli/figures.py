"""``specdec figures``: drawings of what was measured."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from specdec.analysis.columns import Trace
    from specdec.analysis.results import Bench, Tune, Workload

EXAMPLE = "Example: specdec figures --trace bench.jsonl --bench bench.json --out figures"


def figures(
    trace: Annotated[
        list[Path] | None, typer.Option("--trace", metavar="FILE.jsonl", help="Of specdec bench --trace; repeatable.")
    ] = None,
    bench: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Of specdec bench --output.")] = None,
    tuned: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Of specdec tune --output.")] = None,
    workload: Annotated[
        list[Path] | None,
        typer.Option("--workload", metavar="FILE.json", help="Of specdec bench --workload --output; repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")] = Path("figures"),
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Draw only this one; repeatable.")] = None,
    form: Annotated[
        list[str] | None, typer.Option("--format", metavar="svg|png", help="Only this format; repeatable.")
    ] = None,
) -> None:
    """Draw what a bench and a tuner measured, as SVG and PNG for light and dark pages.

    Everything is drawn from the files that are given. What they do not hold is listed with the reason.
    """
    if not (trace or bench or tuned or workload):
        raise ValueError("nothing to draw from: name a --trace, a --bench, a --tuned or a --workload file")
    from specdec.analysis.figures import FORMATS, draw_all

    formats = form or list(FORMATS)
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"--format must be svg or png, got {unknown[0]!r}")

    result, settings = read_results(bench, tuned)
    served = read_workloads(workload or [])
    drawn = draw_all(out.expanduser(), read_traces(trace), result, settings, served, only=only, formats=formats)
    for path in drawn.paths:
        print(path)
    for figure in drawn.missing:
        print(f"not drawn: {figure.name}: needs {figure.reason}", file=sys.stderr)
    if not drawn.paths:
        raise typer.Exit(1)


def read_traces(paths: list[Path] | None) -> Trace | None:
    """The traces as one; what a run that was cut short lacks is told on standard error.

    Raises:
        ValueError: they were made under different conditions, so that one figure would mix what cannot be compared.
    """
    from specdec.analysis.conditions import differences
    from specdec.analysis.load import load

    if not paths:
        return None
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        trace = load(*paths)
    for run in trace.runs[1:]:
        if differing := differences(trace.runs[0].provenance, run.provenance):
            raise ValueError(
                f"{run.path} and {trace.runs[0].path} differ in {', '.join(differing)}: draw them one at a time, "
                "or make a report, which keeps them apart"
            )
    for warning in trace.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return trace


def read_results(bench: Path | None, tuned: Path | None) -> tuple[Bench | None, Tune | None]:
    """Results of both commands, each checked to be of its kind."""
    from specdec.analysis.results import Bench, Tune, load_result

    result = None if bench is None else load_result(bench)
    settings = None if tuned is None else load_result(tuned)
    if result is not None and not isinstance(result, Bench):
        raise ValueError(f"{bench} is no comparison of drafters: give it as {_option_of(result)}")
    if settings is not None and not isinstance(settings, Tune):
        raise ValueError(f"{tuned} is not of specdec tune: give it as {_option_of(settings)}")
    return result, settings


def read_workloads(paths: list[Path]) -> list[Workload]:
    """Results of specdec bench --workload."""
    from specdec.analysis.results import Workload, load_result

    found = []
    for path in paths:
        result = load_result(path)
        if not isinstance(result, Workload):
            raise ValueError(f"{path} is of no workload: give it as {_option_of(result)}")
        found.append(result)
    return found


def _option_of(result: Bench | Tune | Workload) -> str:
    """The option that takes a result of this kind."""
    return {"Bench": "--bench", "Tune": "--tuned", "Workload": "--workload"}[type(result).__name__]
