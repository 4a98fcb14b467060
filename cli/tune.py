"""``specdec tune``: which drafter, which tree and whether to speculate at all, for a target on this machine."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import options
from specdec.cli.groups import grouped
from specdec.cli.text import tell
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.records.prompts import BUILTIN
from specdec.settings import DEFAULTS

if TYPE_CHECKING:
    from specdec.cli.loading import Loaded
    from specdec.tune.prediction import Candidate
    from specdec.tune.setting import Setting

EXAMPLE = "Example: specdec tune --drafter ngram --batch-size 1 --limit 16 --output tuned.json"
_NUM_RACERS = 6


@grouped
def tune(
    target: options.Target = DEFAULT_MODEL,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            metavar=options.DRAFTER_FORM,
            help="A drafter to consider; give it again for more. Default: ngram and hybrid, or model with a draft model. "
            + options.QUOTING,
        ),
    ] = None,
    drafter_model: options.DrafterModel = None,
    verifier: options.Verifier = str(DEFAULTS.verifier),
    batch_size: Annotated[str, typer.Option(metavar="N,N,...", help="Batch sizes to tune for.")] = "1",
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help=f"JSONL as for bench; {BUILTIN}: our own suite.")
    ] = BUILTIN,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Take N prompts only, spread over the file.")] = None,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    max_nodes: options.MaxNodes = DEFAULTS.max_nodes,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="For recording, and again for the race, of each batch size, at most.")
    ] = 300.0,
    output: Annotated[Path, typer.Option(metavar="FILE.json", help="Write the settings here.")] = Path("tuned.json"),
    show_tree: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Draw the best static trees for a tuned file, and end.")
    ] = None,
    *,
    engine: options.Engine,
) -> None:
    """Find the fastest configuration for a target on this machine and write it to a file.

    Measures what passes cost, records what the drafters propose on the prompts, predicts the speedup of every size,
    and races the best few against plain decoding. bench, generate (--config) and the library (drafter="tuned.json")
    take the file.
    """
    if show_tree is not None:
        from specdec.cli.tune_table import print_trees

        print_trees(show_tree)
        return
    sizes = _batch_sizes(batch_size)
    for name, value, least in (("max_new_tokens", max_new_tokens, 2), ("max_nodes", max_nodes, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    options.set_threads(engine.threads)
    from specdec.cli.loading import all_model_facts, eos_ids, load
    from specdec.drafters import parse_drafter, resolved_drafter
    from specdec.engine.causal_lm import CausalLM
    from specdec.records.files import check_writable, write_json
    from specdec.records.provenance import collect
    from specdec.records.tuned import KIND, SCHEMA, fingerprint
    from specdec.sampling import SamplingParams
    from specdec.tune.setting import Setting
    from specdec.verifiers import make_verifier

    output = output.expanduser()
    check_writable(output, "--output")
    drafters = [
        resolved_drafter(spec, bool(drafter_model))
        for spec in drafter or (["model", "ngram"] if drafter_model else ["ngram", "hybrid"])
    ]
    for spec in drafters:
        parse_drafter(spec)
    rule, params = make_verifier(verifier), SamplingParams(temperature)
    loaded = load(target, drafter_model or (), engine)
    specs = _specs(drafters, can_tree=not any(CausalLM(model).chain_only for model in loaded.runtime.draft_models))
    ids = _prompt_ids(loaded, prompts, limit, max_new_tokens)
    setting = Setting(loaded.runtime, rule, params, eos_ids(loaded.model), max_new_tokens)
    models = all_model_facts(target, drafter_model or ())
    per_batch_size = {str(size): _tune(setting, specs, ids, size, max_nodes, seconds) for size in sizes}
    facts = {
        "verifier": verifier,
        "prompts": prompts,
        "num_prompts": len(ids),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "drafters": specs,
        "max_nodes": max_nodes,
        "seconds": seconds,
        "accelerate": engine.accelerate,
        "cuda_graphs": engine.cuda_graphs,
    }
    where = collect(
        ["specdec", *sys.argv[1:]], dtype=loaded.dtype, device=str(loaded.model.device), models=models, settings=facts
    )
    file = {"schema": SCHEMA, "kind": KIND, "provenance": where, "target": target}
    write_json(output, file | {"fingerprint": fingerprint(loaded.model), "per_batch_size": per_batch_size})
    print(f"written to {output}; use it with --config {shlex.quote(str(output))}, or drafter={str(output)!r} in Python")


def _specs(drafters: Sequence[str], can_tree: bool) -> list[str]:
    """Each drafter once, a draft model in all shapes that it ``can_tree`` draft; plain decoding takes part anyway."""
    from specdec.tune.tuning import MODEL_CHAINS, MODEL_TREES

    shapes = (*MODEL_CHAINS, *MODEL_TREES) if can_tree else MODEL_CHAINS
    drafting = [spec for spec in dict.fromkeys(drafters) if spec != "none"]
    return [shaped for spec in drafting for shaped in (shapes if spec == "model" else (spec,))]


def _batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch sizes are written 1,4,8, each at least 1; got {text!r}")
    return sorted(set(sizes))


def _prompt_ids(loaded: Loaded, source: str, limit: int | None, max_new_tokens: int) -> list[list[int]]:
    """First turns only; with a limit taken from all over the file, because neighbours are often alike."""
    from specdec.cli.loading import check_prompt
    from specdec.records.prompts import load_prompts, render_turns

    chosen = load_prompts(source)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}; leave it out to take every prompt")
        count = min(limit, len(chosen))
        chosen = [chosen[i * len(chosen) // count] for i in range(count)]
    prompt_ids = []
    for prompt in chosen:
        ids = list(render_turns(loaded.tokenizer, prompt, []))
        check_prompt(loaded.target, ids, max_new_tokens, f"question {prompt.question_id}")
        prompt_ids.append(ids)
    return prompt_ids


def _tune(
    setting: Setting, specs: Sequence[str], prompts: list[list[int]], size: int, max_nodes: int, seconds: float
) -> dict[str, Any]:
    """The entry of one batch size. The race takes the batches in the order in which they were recorded."""
    from specdec.cli.tune_table import print_race
    from specdec.tune.prediction import predict
    from specdec.tune.recording import record
    from specdec.tune.setting import measure_curve
    from specdec.tune.tuning import finalists, race

    full = prompts * (-(-size // len(prompts)))  # fewer prompts than rows: some twice
    batches = [full[i : i + size] for i in range(0, len(full) - size + 1, size)]
    tell(f"batch size {size}: what passes cost")
    curve = measure_curve(setting, sorted(batches[len(batches) // 2], key=len))
    tell(f"batch size {size}: what {', '.join(specs)} propose")
    plain, *records = record(setting, specs, batches, max_nodes, _timer(seconds))
    candidates = predict(plain, records, curve, size, max_nodes)
    racers = finalists(candidates, _NUM_RACERS)
    tell(f"batch size {size}: racing {', '.join(map(str, racers))}")
    best = race(setting, racers, batches, curve, _timer(seconds))
    print_race(size, racers, best, curve)
    shown = best.record or max(records, key=lambda record: len(record.steps), default=None)
    return {
        "drafter": best.drafter,
        "max_nodes": best.max_nodes,
        "adaptive": best.adaptive,
        **_speedups(best),
        "cost_curve": {str(columns): seconds_per_pass for columns, seconds_per_pass in curve.items()},
        "acceptance_table": shown.acceptance_table() if shown else [],
        "candidates": [
            {"drafter": c.drafter, "max_nodes": c.max_nodes, "adaptive": c.adaptive, "dropped": c.is_dropped}
            | _speedups(c)
            for c in [*racers, *(c for c in candidates if c not in racers)]
        ],
    }


def _timer(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed from now on."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def _speedups(candidate: Candidate) -> dict[str, Any]:
    names = ("predicted", "measured", "predicted_decode", "measured_decode")
    return {name: getattr(candidate, name) for name in names}
