"""From measurements to the numbers of a bench: speedups with their intervals, counts, and matches.

A group of questions that were generated together (one question at batch size 1) is one measurement. A method's speedup
in a group is its tokens per second over those of transformers' generate() in the same group; over all groups it is the
geometric mean, each group weighing as many questions as it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.cli.matching import Match
from specdec.cli.measure import HF_ASSISTED, HF_GENERATE, HF_LOOKUP, PLAIN, Method, Output
from specdec.cli.results import Group, Results, Turn
from specdec.cli.synthetic import SYNTHETIC
from specdec.stats import Stats

SCHEMA = 1
NUM_RESAMPLES = 2000
_HF = (HF_GENERATE, HF_LOOKUP, HF_ASSISTED)
_NOISE_COUPLED = "match"  # the verifier whose sampled output is that of plain decoding with the same seed


@dataclass(frozen=True, slots=True)
class Estimate:
    """A geometric mean with its 95 % bootstrap interval; from one measurement the interval is that point."""

    mean: float
    low: float
    high: float


def summarise(results: Results) -> dict[str, Any]:
    """The JSON of a bench, as documented in docs/bench.md."""
    rows = [_row(results, method) for method in results.methods] if results.groups else []
    return {
        "schema": SCHEMA,
        "partial": results.is_partial,
        "provenance": results.provenance,
        "skipped": results.skipped,
        "rows": rows,
    }


def geometric_mean(ratios: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The weighted geometric mean of ``ratios`` and a percentile bootstrap over them, the same at every call."""
    logs, weight = np.log(np.asarray(ratios)), np.asarray(weights, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(logs), size=(NUM_RESAMPLES, len(logs)))
    means = (logs * weight)[picks].sum(1) / weight[picks].sum(1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return Estimate(float(np.exp((logs * weight).sum() / weight.sum())), float(low), float(high))


def _row(results: Results, method: Method) -> dict[str, Any]:
    match = _matches(results, method)
    names = {"method": method.name, "drafter": method.drafter, "verifier": method.verifier, "lossless": method.lossless}
    row = names | _numbers(results, method, None) | {"match": match[None].as_dict()}
    categories = dict.fromkeys(q.prompt.category for group in results.groups for q in group.questions)
    row["categories"] = {
        name: names | _numbers(results, method, name) | {"match": match[name].as_dict()} for name in categories
    }
    return row


def _numbers(results: Results, method: Method, category: str | None) -> dict[str, Any]:
    """Everything but the match, of all questions or of one category."""
    counted = [(group, _questions_in(group, category)) for group in results.groups]
    counted = [(group, numbers) for group, numbers in counted if numbers]
    baseline = results.methods[0]
    weights = [len(numbers) for _, numbers in counted]
    groups = [group for group, _ in counted]
    speedup = geometric_mean([_rate(g, method) / _rate(g, baseline) for g in groups], weights)
    decode = [(_decode_rate(g, method), _decode_rate(g, baseline), w) for g, w in zip(groups, weights, strict=True)]
    decode = [pair for pair in decode if pair[0] > 0 and pair[1] > 0]
    ratio = geometric_mean([a / b for a, b, _ in decode], [w for *_, w in decode]) if decode else None
    totals = _Totals.of(method, counted)
    plain = next((m for m in results.methods if m.name == PLAIN), None)
    own = None if plain is None else geometric_mean([_rate(g, method) / _rate(g, plain) for g in groups], weights)
    return {
        "speedup": speedup.mean,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "speedup_vs_plain": own and own.mean,
        "speedup_vs_plain_low": own and own.low,
        "speedup_vs_plain_high": own and own.high,
        "speedup_decode": ratio and ratio.mean,
        "speedup_decode_low": ratio and ratio.low,
        "speedup_decode_high": ratio and ratio.high,
        "num_prompts": sum(weights),
        "num_measurements": len(groups),
        **totals.as_dict(is_own=method.name not in _HF),
    }


def _questions_in(group: Group, category: str | None) -> set[int]:
    return {q.number for q in group.questions if category is None or q.prompt.category == category}


def _rate(group: Group, method: Method) -> float:
    return sum(turn.outputs[method].num_tokens for turn in group.turns) / group.seconds(method)


def _decode_rate(group: Group, method: Method) -> float:
    """Tokens per second after the first pass; 0 where there were none."""
    outputs = [turn.outputs[method] for turn in group.turns]
    tokens = sum(o.num_tokens - o.num_first for o in outputs)
    seconds = sum(o.total_s - o.first_s for o in outputs)
    return tokens / seconds if tokens and seconds > 0 else 0.0


@dataclass(slots=True)
class _Totals:
    """Sums over outputs. A batch's seconds are shared out by tokens, so that categories add up to the whole."""

    stats: Stats
    num_outputs: int = 0
    num_tokens: int = 0
    wall_s: float = 0.0
    prefill_s: float = 0.0
    model_s: float = 0.0

    @classmethod
    def of(cls, method: Method, counted: Sequence[tuple[Group, set[int]]]) -> _Totals:
        totals = cls(Stats())
        for group, numbers in counted:
            for turn in group.turns:
                totals.add(turn, turn.outputs[method], numbers)
        return totals

    def add(self, turn: Turn, output: Output, numbers: set[int]) -> None:
        places = [i for i, q in enumerate(turn.questions) if q.number in numbers]
        num_tokens = sum(len(output.tokens[i]) for i in places)
        share = num_tokens / output.num_tokens
        self.num_outputs += len(places)
        self.num_tokens += num_tokens
        self.wall_s += output.total_s * share
        self.prefill_s += output.first_s * share
        self.model_s += (output.model_s or 0.0) * share
        for step in output.steps:
            if step.row in numbers:
                self.stats.add(step)
        if not output.steps:
            for i in places:
                _count_blocks(self.stats, output.blocks[i])

    def as_dict(self, *, is_own: bool) -> dict[str, Any]:
        stats, if_own = self.stats, _if(is_own)
        return {
            "num_outputs": self.num_outputs,
            "num_tokens": self.num_tokens,
            "tokens_per_s": self.num_tokens / self.wall_s,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "num_drafts": stats.num_drafts,
            "num_draft_tokens": if_own(stats.num_draft_tokens),
            "num_accepted_tokens": stats.num_accepted_tokens,
            "accepted_per_pos": stats.num_accepted_tokens_per_pos,
            "draft_s": if_own(stats.draft_s),
            "score_s": if_own(stats.score_s),
            "verify_s": if_own(stats.verify_s),
            "wall_s": self.wall_s,
            "prefill_s": self.prefill_s,
            "model_s": if_own(self.model_s),
            "host_s": if_own(self.wall_s - self.model_s),
        }


def _if(is_known: bool) -> Callable[[float], float | None]:
    """transformers does not tell what it drafted or how long its parts took."""
    return lambda value: value if is_known else None


def _count_blocks(stats: Stats, blocks: Sequence[int]) -> None:
    """Acceptance as seen from outside: each pass brings one token of the target's and the rest was drafted."""
    for size in blocks:
        stats.num_drafts += 1
        stats.num_accepted_tokens += size - 1
        per_pos = stats.num_accepted_tokens_per_pos
        per_pos.extend([0] * (size - 1 - len(per_pos)))
        for i in range(size - 1):
            per_pos[i] += 1


def _matches(results: Results, method: Method) -> dict[str | None, Match]:
    """The comparison of every output with its reference: over all (key None) and for each category."""
    reference = _reference(results, method)
    names = {q.prompt.category for group in results.groups for q in group.questions}
    matches: dict[str | None, Match] = {name: Match(reference.name if reference else None) for name in (None, *names)}
    if reference is None:
        return matches
    for group in results.groups:
        for number, turn in enumerate(group.turns):
            expected, got = turn.outputs[reference].tokens, turn.outputs[method].tokens
            for i, question in enumerate(turn.questions):
                difference = results.judge.compare(
                    turn.batch.prompts[i], question.number, expected[i], got[i], question.prompt.question_id, number
                )
                for match in (matches[None], matches[question.prompt.category]):
                    match.total += 1
                    match.identical += difference is None
                    match.differences += [difference] if difference else []
    return matches


def _reference(results: Results, method: Method) -> Method | None:
    """Whose tokens the method must emit: generate()'s if greedy. Sampled, those of our own plain decoding with the
    same seed, if the verifier promises them; other rules keep the distribution only, and so does another's noise.
    """
    if method.name == SYNTHETIC:
        return None
    if results.config.temperature == 0:
        return results.methods[0] if method is not results.methods[0] else None
    if method.name in (*_HF, PLAIN) or method.verifier != _NOISE_COUPLED:
        return None
    return next(m for m in results.methods if m.name == PLAIN)
