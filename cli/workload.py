"""The measurement behind ``specdec bench --workload``: engines that serve the same requests, each in turn.

First every request is answered alone, one after another: these answers are what every engine's are compared with, and
what later turns of a conversation contain, so that all engines get the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from specdec.cli.bench_config import BenchConfig
from specdec.cli.details import token_texts
from specdec.cli.loading import Loaded, all_model_facts, check_prompt, eos_ids, load
from specdec.cli.options import set_threads
from specdec.cli.progress import Tell
from specdec.cli.saved import silent_transformers
from specdec.cli.workload_hf import HfBatches, HfContinuous
from specdec.cli.workload_options import HF, PAGED, RAGGED, EngineSpec, parse_engine
from specdec.cli.workload_own import Paged, own_batches
from specdec.cli.workload_runs import Asked, Run, WorkloadEngine
from specdec.drafters import resolved_drafter
from specdec.records.provenance import collect
from specdec.records.trace import TraceWriter
from specdec.records.workloads import Defaults, Request, build_workload, conversation, render, waves

WARM_UP_TOKENS = 8


@dataclass(slots=True)
class WorkloadResults:
    """Everything that was measured."""

    config: BenchConfig
    provenance: dict[str, Any]
    loaded: Loaded
    asked: list[Asked]
    reference: dict[str, tuple[int, ...]]  # each request's answer alone
    engines: list[WorkloadEngine]
    runs: list[list[Run]] = field(default_factory=list)  # of each engine
    is_partial: bool = False


def run_workload(config: BenchConfig, *, command: Sequence[str] = ("run_workload",), tell: Tell) -> WorkloadResults:
    """Measure; Ctrl-C ends it early with the repeats that every engine had finished, marked partial.

    Raises:
        ValueError, OSError: bad input, before anything is measured.
    """
    set_threads(config.threads)
    specs = [parse_engine(text) for text in config.serving.engines or (PAGED, HF)]
    loaded = load(config.target, config.drafter_models or (), config, compare=True)
    defaults = Defaults(config.max_new_tokens, config.temperature, config.seed)
    requests = build_workload(config.serving.spec, defaults, loaded.tokenizer)
    _check_first(loaded, requests)
    ends = eos_ids(loaded.model)
    drafters = list(
        dict.fromkeys(resolved_drafter(name, bool(config.drafter_models)) for name in config.drafters or ("auto",))
    )
    engines = make_engines(specs, config, drafters, loaded, ends)
    with ExitStack() as stack:
        stack.enter_context(silent_transformers())
        asked, reference = _alone(config, loaded, requests, ends, tell)
        results = WorkloadResults(
            config,
            _provenance(config, loaded, command, asked),
            loaded,
            asked,
            reference,
            engines,
            [[] for _ in engines],
        )
        _measure(results, tell)
        if config.trace is not None and not results.is_partial:
            writer = stack.enter_context(TraceWriter(config.trace, results.provenance))
            _write_trace(writer, results)
    return results


def make_engines(
    specs: Sequence[EngineSpec], config: BenchConfig, drafters: Sequence[str], loaded: Loaded, ends: frozenset[int]
) -> list[WorkloadEngine]:
    """Every engine with every number of rows, ours with every drafter."""
    engines: list[WorkloadEngine] = []
    for max_rows in config.serving.max_rows or (16,):
        for spec in specs:
            if spec.name == PAGED:
                engines += [Paged(spec, drafter, max_rows, config, loaded, ends) for drafter in drafters]
            elif spec.name == RAGGED:
                engines += [own_batches(spec, drafter, max_rows, config, loaded, ends) for drafter in drafters]
            elif spec.name == HF:
                engines.append(HfBatches(spec, max_rows, loaded.model, ends))
            else:
                engines.append(HfContinuous(spec, max_rows, loaded.model, ends))
    return engines


def _check_first(loaded: Loaded, requests: Sequence[Request]) -> None:
    """Refuse what would fail in the middle; answers are counted at their longest."""
    by_id = {request.request_id: request for request in requests}
    for request in requests:
        before, room = request, request.max_new_tokens
        while before.follows is not None:
            before = by_id[before.follows]
            room += before.max_new_tokens
        empty = dict.fromkeys(by_id, "")
        ids = render(loaded.tokenizer, conversation(request, by_id, empty))
        check_prompt(loaded.target, ids, room, f"request {request.request_id}")


def _alone(
    config: BenchConfig, loaded: Loaded, requests: Sequence[Request], ends: frozenset[int], tell: Tell
) -> tuple[list[Asked], dict[str, tuple[int, ...]]]:
    """The requests with their token ids, and each one's answer alone: generate()'s, or sampled with our own noise."""
    plain = replace(config, verifier="match", adaptive=False)
    greedy = HfBatches(EngineSpec(HF, HF, ()), 1, loaded.model, ends)
    sampled = own_batches(EngineSpec("plain", RAGGED, ()), "none", 1, plain, loaded, ends)
    by_id = {request.request_id: request for request in requests}
    asked: list[Asked] = []
    reference: dict[str, tuple[int, ...]] = {}
    answers: dict[str, str] = {}
    for wave in waves(requests):
        for request in wave:
            tell(len(asked), len(requests), "one by one")
            ids = tuple(render(loaded.tokenizer, conversation(request, by_id, answers)))
            asked.append(Asked(request, ids))
            single = Asked(replace(request, arrival_s=0.0, follows=None), ids)
            run = (sampled if request.temperature else greedy).run([single])
            reference[request.request_id] = run.served[request.request_id].tokens
            answers[request.request_id] = loaded.tokenizer.decode(
                reference[request.request_id], skip_special_tokens=True
            )
    return asked, reference


def _measure(results: WorkloadResults, tell: Tell) -> None:
    """Every engine in turn, beginning with another one in each repeat."""
    engines, repeats = results.engines, results.config.serving.repeats
    short = [
        Asked(
            replace(each.request, max_new_tokens=min(WARM_UP_TOKENS, each.request.max_new_tokens), arrival_s=0, follows=None),
            each.ids[::-1],
        )
        for each in results.asked[:2]
    ]  # fmt: skip
    runs: list[list[Run]] = [[] for _ in engines]
    try:
        for engine in engines:
            tell(0, 1, "warming up")
            engine.run(short)
        for repeat in range(repeats):
            done = []
            for i in range(len(engines)):
                place = (i + repeat) % len(engines)
                tell(repeat * len(engines) + i, repeats * len(engines), engines[place].spec.text)
                done.append((place, engines[place].run(results.asked)))
            for place, run in done:
                runs[place].append(run)
    except KeyboardInterrupt:
        results.is_partial = True
    results.runs = runs


def _provenance(config: BenchConfig, loaded: Loaded, command: Sequence[str], asked: Sequence[Asked]) -> dict[str, Any]:
    settings = asdict(config)
    settings |= settings.pop("serving")
    for name in ("prompts", "limit", "batch_size", "config", "synthetic_acceptance", "trace_probs"):
        del settings[name]
    settings |= {"num_prompts": len(asked), "context_limit": loaded.target.context_length}
    models = all_model_facts(config.target, config.drafter_models or ())
    return collect(command, dtype=loaded.dtype, device=str(loaded.model.device), models=models, settings=settings)


def engine_name(engine: WorkloadEngine) -> str:
    """What tells an engine of a run from the others."""
    drafter = "" if engine.drafter is None else f" + {engine.drafter}"
    return f"{engine.spec.text}{drafter}, {engine.max_rows} row{'s' * (engine.max_rows > 1)}"


def _write_trace(writer: TraceWriter, results: WorkloadResults) -> None:
    """The first run of each engine: prompts, steps and outputs as of any bench, and each pass of ``paged``."""
    category = results.config.serving.spec.name
    seen: set[int] = set()
    for each in results.asked:
        writer.prompt(each.ids, question_id=each.id, category=category, turn=0)
        seen.update(each.ids, results.reference[each.id])
    for runs in results.runs:
        for served in runs[0].served.values():
            seen.update(served.tokens, *(step.tree_tokens for step in served.steps))
    writer.vocabulary(token_texts(results.loaded.tokenizer, sorted(seen)))
    for engine, runs in zip(results.engines, results.runs, strict=True):
        names = {"method": engine_name(engine), "drafter": None, "verifier": None}
        for group, each in enumerate(results.asked):
            labels = {**names, "question_id": each.id, "category": category, "turn": 0}
            served = runs[0].served[each.id]
            for step in served.steps:
                writer.step(step, None, **labels)
            first, last = served.times[0] - served.arrival_s, served.times[-1] - served.arrival_s
            writer.output(
                served.tokens, wall_s=last, prefill_s=first, **labels, group=group, num_rows=1,
                num_prompt_tokens=len(each.ids),
            )  # fmt: skip
        for at, record in zip(runs[0].pass_times, runs[0].passes, strict=True):
            writer.engine_pass(asdict(record), time_s=at - runs[0].started_s, **names)
    writer.end()
