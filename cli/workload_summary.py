"""From runs of a workload to its numbers: speed, waiting times, use of the cache, and whether the tokens are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from specdec.cli.matching import Judge, Match
from specdec.cli.workload import WorkloadResults
from specdec.cli.workload_cache import cache_numbers
from specdec.cli.workload_options import PAGED
from specdec.cli.workload_runs import Asked, Run, WorkloadEngine
from specdec.sampling import SamplingParams
from specdec.stats import Stats
from specdec.verifiers import make_verifier

SCHEMA, KIND = 1, "workload"
GREEDY_REFERENCE, SAMPLED_REFERENCE = "hf-generate, one by one", "plain, one by one"
_SHARES = (50, 90, 99)


def summarise_workload(results: WorkloadResults) -> dict[str, Any]:
    """The JSON of a workload, as documented in docs/workloads.md."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "partial": results.is_partial,
        "provenance": results.provenance,
        "workload": {
            "name": results.config.serving.workload,
            "num_requests": len(results.asked),
            "prompt_tokens": [len(each.ids) for each in results.asked],
            "max_new_tokens": [each.request.max_new_tokens for each in results.asked],
        },
        "rows": [
            _row(results, engine, runs) for engine, runs in zip(results.engines, results.runs, strict=True) if runs
        ],
    }


def _row(results: WorkloadResults, engine: WorkloadEngine, runs: Sequence[Run]) -> dict[str, Any]:
    first, is_ours = runs[0], engine.spec.is_ours
    rates = [sum(len(each.tokens) for each in run.served.values()) / run.wall_s for run in runs]
    row: dict[str, Any] = {
        "engine": engine.spec.text,
        "kind": engine.spec.name,
        "drafter": engine.drafter,
        "verifier": results.config.verifier if is_ours else None,
        "lossless": not is_ours or make_verifier(results.config.verifier).lossless,
        "max_rows": engine.max_rows,
        "num_tokens": sum(len(each.tokens) for each in first.served.values()),
        "wall_s": float(np.median([run.wall_s for run in runs])),
        "tokens_per_s": float(np.median(rates)),
        "tokens_per_s_each": rates,
        **_waiting(runs),
        "acceptance": _acceptance(first) if is_ours else None,
        "num_passes": first.num_passes,
        "prefix_hit_rate": None,
        "preemptions": None,
        "kv": None,
        "match": _match(results, engine, runs),
        "requests": [
            {
                "request_id": each.id,
                "num_prompt": len(each.ids),
                "num_tokens": len(served.tokens),
                "arrival_s": served.arrival_s - first.started_s,
                "first_s": served.times[0] - first.started_s,
                "end_s": served.times[-1] - first.started_s,
                "num_cached": served.num_cached,
            }
            for each in results.asked
            for served in (first.served[each.id],)
        ],
    }
    if engine.spec.name == PAGED:
        row |= cache_numbers(results, engine, first)
    return row


def _waiting(runs: Sequence[Run]) -> dict[str, Any]:
    """Seconds from arrival to the first token, between two passes that brought tokens, and a token after the first."""
    served = [each for run in runs for each in run.served.values()]
    gaps = [gap for each in served for gap in _gaps(each.times)]
    spans = [(e.times[-1] - e.times[0]) / (len(e.times) - 1) for e in served if len(e.times) > 1]
    return {
        "first_token_s": _spread([each.times[0] - each.arrival_s for each in served]),
        "inter_token_s": _spread(gaps),
        "per_token_s": _spread(spans),
        "request_s": _spread([each.times[-1] - each.arrival_s for each in served]),
    }


def _gaps(times: Sequence[float]) -> Iterator[float]:
    distinct = sorted(set(times))
    return (after - before for before, after in pairwise(distinct))


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    shares = {f"p{share}": float(np.percentile(values, share)) for share in _SHARES}
    return {"mean": float(np.mean(values)), **shares}


def _acceptance(run: Run) -> dict[str, Any]:
    stats = Stats()
    for served in run.served.values():
        for step in served.steps:
            stats.add(step)
    counts = stats.as_dict()
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "mean_acceptance_length", "acceptance_rate")
    return {name: counts[name] for name in names}


def _match(results: WorkloadResults, engine: WorkloadEngine, runs: Sequence[Run]) -> dict[str, Any]:
    """Every output of every repeat against the request's answer alone, where noise is the same or there is none."""
    verifier = results.config.verifier
    comparable = [
        each for each in results.asked
        if each.request.temperature == 0 or (engine.spec.is_ours and verifier == "match")
    ]  # fmt: skip
    if not comparable:
        return Match(None).as_dict()
    sampled = any(each.request.temperature for each in comparable)
    match = Match(SAMPLED_REFERENCE if sampled else GREEDY_REFERENCE)
    for run in runs:
        for each in comparable:
            _compare(results, match, each, run.served[each.id].tokens)
    return match.as_dict()


def _compare(results: WorkloadResults, match: Match, asked: Asked, got: tuple[int, ...]) -> None:
    params = SamplingParams(asked.request.temperature)
    judge = Judge(results.loaded.model, params, asked.request.seed)
    difference = judge.compare(asked.ids, 0, results.reference[asked.id], got, asked.id, 0)
    match.total += 1
    if difference is None:
        match.identical += 1
    else:
        match.differences.append(difference)


def unexplained(summary: Mapping[str, Any]) -> int:
    """Outputs that differ for no known reason."""
    return sum(row["match"]["unexplained"] for row in summary["rows"])
