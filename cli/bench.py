"""``specdec bench``: how fast the drafters are on this machine, against transformers' generate(), and whether the
tokens are the same.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli import options
from specdec.cli.bench_config import BenchConfig
from specdec.cli.groups import grouped
from specdec.records.prompts import BUILTIN

EXAMPLE = "Example: specdec bench --limit 8 --max-new-tokens 48 --drafter ngram --drafter ngram:max_order=2 --output bench.json"


@grouped
def bench(
    *,
    config: BenchConfig,
    output: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write all numbers here.")] = None,
) -> None:
    """Measure drafters against Hugging Face generate() and compare their tokens.

    In one process, prompt by prompt in turn: generate(), its prompt lookup (and assisted generation, with a draft
    model), our own loop without drafts, and each drafter. Status 1 if tokens differ for another reason than rounding.
    All decode from the model's own distribution: of its saved generation_config.json only the ends of a text hold.
    With --workload, engines serve many requests, and throughput, waiting times and use of the cache are measured.
    """
    if config.trace_probs and config.trace is None:
        raise ValueError("--trace-probs writes to the trace: add --trace FILE.jsonl")
    output, trace = (path.expanduser() if path else None for path in (output, config.trace))
    spec = None if config.serving.workload is None else config.serving.spec
    _check_paths(config.prompts if spec is None or not spec.is_file else spec.name, output, trace)
    config = replace(config, trace=trace)
    if config.serving.workload is not None:
        _run_workload(config, output)
        return
    tuned = options.read_config(config.config)
    if tuned is not None:
        entry = tuned.nearest(config.batch_size)
        drafters = list(dict.fromkeys([entry.drafter, *(config.drafters or ())]))
        config = replace(config, drafters=drafters, max_nodes=entry.max_nodes, adaptive=entry.adaptive)
    _run(config, output)


def _run(config: BenchConfig, output: Path | None) -> None:
    """Measure, write and show; the status tells of an interruption or a mismatch."""
    from specdec.cli.benchmark import run_bench
    from specdec.cli.progress import progress
    from specdec.cli.summary import summarise
    from specdec.cli.table import print_summary
    from specdec.records.files import write_json

    with progress() as tell:
        results = run_bench(config, command=["specdec", *sys.argv[1:]], tell=tell)
    summary = summarise(results)
    if output is not None:
        write_json(output, summary)
    print_summary(summary)
    if results.is_partial:
        raise typer.Exit(130)
    if any(row["match"]["unexplained"] for row in summary["rows"]):
        raise typer.Exit(1)


def _run_workload(config: BenchConfig, output: Path | None) -> None:
    """The same for a workload of many requests."""
    from specdec.cli.progress import progress
    from specdec.cli.workload import run_workload
    from specdec.cli.workload_summary import summarise_workload, unexplained
    from specdec.cli.workload_table import print_workload
    from specdec.records.files import write_json

    with progress() as tell:
        results = run_workload(config, command=["specdec", *sys.argv[1:]], tell=tell)
    summary = summarise_workload(results)
    if output is not None:
        write_json(output, summary)
    print_workload(summary)
    if results.is_partial:
        raise typer.Exit(130)
    if unexplained(summary):
        raise typer.Exit(1)


def _check_paths(prompts: str, output: Path | None, trace: Path | None) -> None:
    """Refuse files that cannot be written, or that would overwrite each other or the prompts."""
    from specdec.records.files import check_writable

    taken = {} if prompts == BUILTIN else {Path(prompts).expanduser().resolve(): "the prompts"}
    for what, path in (("--output", output), ("--trace", trace)):
        if path is None:
            continue
        other = taken.setdefault(path.resolve(), what)
        if other != what and (path.is_file() or not path.exists()):
            raise ValueError(f"{what} and {other} are the same file, {path}; name another")
        check_writable(path, what)
