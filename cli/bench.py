"""``specdec bench``: how fast the drafters are on this machine, against transformers' generate(), and whether the
tokens are the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specdec.cli import options
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.records.prompts import BUILTIN
from specdec.settings import DEFAULTS

if TYPE_CHECKING:
    from specdec.cli.results import BenchConfig

EXAMPLE = "Example: specdec bench --limit 8 --max-new-tokens 48 --drafter ngram --drafter ngram:max_order=2 --output bench.json"


def bench(
    target: options.Target = DEFAULT_MODEL,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            metavar=options.DRAFTER_FORM,
            help=f"A drafter to measure; give it again for more. Default: {DEFAULTS.drafter!s}, or model with a draft model. "
            + options.QUOTING,
        ),
    ] = None,
    drafter_model: options.DrafterModel = None,
    verifier: options.Verifier = str(DEFAULTS.verifier),
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help=f"JSONL in Spec-Bench's form or with prompts; {BUILTIN}: our own suite.")
    ] = BUILTIN,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Take the first N prompts only.")] = None,
    max_new_tokens: options.MaxNewTokens = options.DEFAULT_MAX_NEW_TOKENS,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts that are generated together.")] = 1,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    max_nodes: options.MaxNodes = DEFAULTS.max_nodes,
    adaptive: options.Adaptive = True,
    config: options.Config = None,
    synthetic_acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,RATE,...|mean=X", help="Also what a drafter accepted like this would bring; no text."
        ),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Let every answer match a JSON schema (FILE.json) or a Lark grammar (others)."
        ),
    ] = None,
    accelerate: options.Accelerate = True,
    cuda_graphs: options.CudaGraphs = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write all numbers here.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write every step here.")] = None,
    trace_probs: Annotated[
        bool, typer.Option("--trace-probs", help="With --trace: probabilities and entropies of every step too.")
    ] = False,
) -> None:
    """Measure drafters against Hugging Face generate() and compare their tokens.

    In one process, prompt by prompt in turn: generate(), its prompt lookup (and assisted generation, with a draft
    model), our own loop without drafts, and each drafter. Status 1 if tokens differ for another reason than rounding.
    All decode from the model's own distribution: of its saved generation_config.json only the ends of a text hold.
    """
    if trace_probs and trace is None:
        raise ValueError("--trace-probs writes to the trace: add --trace FILE.jsonl")
    output, trace = (path.expanduser() if path else None for path in (output, trace))
    _check_paths(prompts, output, trace)
    from specdec.cli.results import BenchConfig

    tuned = options.read_config(config)
    if tuned is not None:
        entry = tuned.nearest(batch_size)
        drafter = list(dict.fromkeys([entry.drafter, *(drafter or ())]))
        max_nodes, adaptive = entry.max_nodes, entry.adaptive
    asked = BenchConfig(
        target=target,
        drafters=tuple(drafter or ()),
        drafter_models=tuple(drafter_model or ()),
        verifier=verifier,
        prompts=prompts,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        max_nodes=max_nodes,
        adaptive=adaptive,
        accelerate=accelerate,
        cuda_graphs=cuda_graphs,
        dtype=dtype,
        device=device,
        threads=threads,
        trace=trace,
        trace_probs=trace_probs,
        config=config,
        synthetic_acceptance=synthetic_acceptance,
        grammar=grammar,
    )
    _run(asked, output)


def _run(asked: BenchConfig, output: Path | None) -> None:
    """Measure, write and show; the status tells of an interruption or a mismatch."""
    from specdec.cli.benchmark import run_bench
    from specdec.cli.progress import progress
    from specdec.cli.summary import summarise
    from specdec.cli.table import print_summary
    from specdec.records.files import write_json

    with progress() as tell:
        results = run_bench(asked, command=["specdec", *sys.argv[1:]], tell=tell)
    summary = summarise(results)
    if output is not None:
        write_json(output, summary)
    print_summary(summary)
    if results.is_partial:
        raise typer.Exit(130)
    if any(row["match"]["unexplained"] for row in summary["rows"]):
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
