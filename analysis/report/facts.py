"""What a report says of one run, as plain data: a row for each method, and one sentence that sums up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.analysis.acceptance import mean_acceptance_length
from specdec.analysis.columns import BASELINE, PLAIN, Output, Trace
from specdec.analysis.intervals import Estimate
from specdec.analysis.results import Bench, row_name
from specdec.analysis.speedup import rates, speedups

MIN_PROMPTS = 6  # fewer lie on one side of 1 by chance more often than one time in twenty


def is_proved(estimate: Estimate) -> bool:
    """Whether a speed differs from 1 beyond doubt: by its interval, and from enough prompts for it to mean anything."""
    return estimate.num_prompts >= MIN_PROMPTS and not estimate.low <= 1 <= estimate.high


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """One method; None where the run does not tell."""

    name: str
    is_lossless: bool | None
    drafts: bool
    tokens_per_s: float | None
    length: float | None  # mean acceptance length
    vs_generate: Estimate | None
    vs_plain: Estimate | None
    same_text: tuple[int, int] | None  # outputs equal to those of generate(), of how many
    categories: Mapping[str, Estimate] = field(default_factory=dict)  # against plain decoding, else against generate()


@dataclass(frozen=True, slots=True)
class Facts:
    """One chapter's numbers."""

    provenance: Mapping[str, Any]
    methods: tuple[MethodFacts, ...]
    warnings: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """What categories are compared with."""
        return "plain decoding" if any(m.vs_plain for m in self.methods) else "generate()"

    @property
    def best(self) -> MethodFacts | None:
        """The fastest method that drafts and keeps the target's distribution."""
        fit = [m for m in self.methods if m.drafts and m.is_lossless is not False and (m.vs_plain or m.vs_generate)]
        return max(fit, key=_speed, default=None)


def _speed(method: MethodFacts) -> float:
    """Against whatever there is: all methods of a run have the same."""
    estimate = method.vs_plain or method.vs_generate
    return estimate.value if estimate else 0.0


def facts_of_trace(trace: Trace) -> Facts:
    """Counted from the steps and outputs alone."""
    to_generate = speedups(trace) if BASELINE in trace.names else {}
    to_plain = speedups(trace, PLAIN) if PLAIN in trace.names else {}
    by_category = {name: speedups(part, base) for name, part, base in _parts(trace)}
    measured = rates(trace)
    texts = _texts(trace)
    methods = []
    for name in trace.names:
        own = trace.select(name)
        groups = measured.get(name, {}).values()
        seconds = sum(group.seconds for group in groups)
        claims = {output.lossless for output in own.outputs} - {None}
        methods.append(
            MethodFacts(
                name=name,
                is_lossless=None if not claims else False not in claims,
                drafts=name in trace.drafting,
                tokens_per_s=sum(group.num_tokens for group in groups) / seconds if seconds else None,
                length=mean_acceptance_length(own).value if len(own.steps) else None,
                vs_generate=to_generate.get(name),
                vs_plain=to_plain.get(name),
                same_text=_same(texts, name),
                categories={
                    category: by_method[name] for category, by_method in by_category.items() if name in by_method
                },
            )
        )
    return Facts(trace.runs[0].provenance, tuple(methods), tuple(trace.warnings))


def facts_of_bench(bench: Bench) -> Facts:
    """Taken from the result as it is."""

    def estimate(row: Mapping[str, Any], key: str) -> Estimate | None:
        if row.get(key) is None:
            return None
        return Estimate(row[key], row[f"{key}_low"], row[f"{key}_high"], row["num_prompts"])

    methods = []
    for row in bench.rows:
        match = row["match"]
        key = "speedup" if row.get("speedup_vs_plain") is None else "speedup_vs_plain"
        parts = {name: estimate(part, key) for name, part in row["categories"].items()}
        methods.append(
            MethodFacts(
                name=row_name(row),
                is_lossless=bool(row["lossless"]),
                drafts=row["drafter"] is not None,
                tokens_per_s=row["tokens_per_s"],
                length=row["mean_acceptance_length"],
                vs_generate=estimate(row, "speedup"),
                vs_plain=estimate(row, "speedup_vs_plain"),
                same_text=(match["identical"], match["total"]) if match["total"] else None,
                categories={name: part for name, part in parts.items() if part is not None},
            )
        )
    warnings = (
        (f"{bench.path}: the run was interrupted; only what was complete is counted",) if bench.is_partial else ()
    )
    return Facts(bench.provenance, tuple(methods), warnings)


def summary(facts: Facts) -> str:
    """The sentence that stands first: what is fastest, how sure that is, and where it hurts."""
    best = facts.best
    if best is None:
        return "No method of this run drafted anything, so there is nothing to compare."
    estimate = best.vs_plain or best.vs_generate
    assert estimate is not None
    against = facts.reference
    interval = f"{estimate.value:.2f}x [{estimate.low:.2f}, {estimate.high:.2f}]"
    n = estimate.num_prompts
    if n < 2:
        first = (
            f"{best.name} is {estimate.value:.2f}x as fast as {against} here, measured once: too little to conclude."
        )
    elif is_proved(estimate) and estimate.value > 1:
        first = f"{best.name} is {interval} as fast as {against} on this machine."
    elif is_proved(estimate):
        first = f"No method is faster than {against}: the best, {best.name}, is {interval} as fast."
    else:
        first = f"No method is proved faster than {against}: the best, {best.name}, is {interval} as fast."
    parts = [first, _worst(best, against)]
    if best.vs_plain and best.vs_generate and n > 1:
        other = best.vs_generate
        parts.append(f"Against transformers' generate() it is {other.value:.2f}x [{other.low:.2f}, {other.high:.2f}].")
    if best.same_text:
        same, total = best.same_text
        parts.append(f"Its text is that of generate() in {same} of {total} outputs.")
    return " ".join(part for part in parts if part)


def _worst(best: MethodFacts, against: str) -> str:
    hurts = [name for name, estimate in best.categories.items() if is_proved(estimate) and estimate.value < 1]
    may = [name for name, estimate in best.categories.items() if estimate.value < 1 and name not in hurts]
    said = [f"It hurts on {_listed(hurts)}."] if hurts else []
    if may:
        said.append(f"On {_listed(may)} it was slower than {against}, which may be chance.")
    return " ".join(said)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _parts(trace: Trace) -> list[tuple[str, Trace, str]]:
    """Each category with what its methods are compared with."""
    base = PLAIN if PLAIN in trace.names else BASELINE
    parts = [(name, trace.select(None, [name])) for name in trace.categories]
    return [(name, part, base) for name, part in parts if base in part.names]


_Place = tuple[int, str, int]  # run, question, turn


def _texts(trace: Trace) -> dict[str, dict[_Place, Output]]:
    texts: dict[str, dict[_Place, Output]] = {}
    for output in trace.outputs:
        label = output.label
        texts.setdefault(label.name, {})[label.run, label.question_id, label.turn] = output
    return texts


def _same(texts: Mapping[str, Mapping[_Place, Output]], name: str) -> tuple[int, int] | None:
    """How many outputs have the tokens of generate()'s; None for itself."""
    own, reference = texts.get(name, {}), texts.get(BASELINE, {})
    shared = [place for place in own if place in reference]
    if name == BASELINE or not shared:
        return None
    return sum(own[place].token_ids == reference[place].token_ids for place in shared), len(shared)
