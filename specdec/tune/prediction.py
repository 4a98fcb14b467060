"""Predicts what every tree size would bring, from recorded drafts and what passes cost: no passes of the target.

Prediction and race speak of the same two quantities, each a geometric mean over batches of the ratio to plain decoding
of the same batch: tokens a second of whole answers, and of decoding alone, behind the pass that holds the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np

from specdec.budget.adaptive import AdaptiveBudget
from specdec.budget.costs import PassCosts
from specdec.drafters import format_drafter, parse_drafter
from specdec.tune.adaptive_replay import AdaptiveReplay
from specdec.tune.recording import NONE, Record
from specdec.tune.replay import Replayed, StepSeconds
from specdec.tune.setting import Draft

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

Interval = tuple[float, float, float]  # a speedup with its 95 % interval


@dataclass(slots=True)
class Candidate:
    """One configuration, what it should bring and what it brought, in whole answers and in decoding alone."""

    drafter: str
    max_nodes: int
    adaptive: bool
    predicted: float  # speedup against "none"
    record: Record | None = None
    measured: Interval | None = None
    is_dropped: bool = False  # the race was over for it early
    predicted_decode: float = 1.0
    measured_decode: Interval | None = None
    ratios: Sequence[tuple[float, float]] = ()  # what is predicted for each batch: whole answers, decoding

    def __str__(self) -> str:
        return self.drafter if self.drafter == NONE else f"{self.drafter} {self.size}"

    @property
    def size(self) -> str:
        return f"{'adaptive, up to' if self.adaptive else 'always'} {self.max_nodes} nodes"

    def expect(self, num_batches: int) -> None:
        """Predict for the first batches alone: those that were raced."""
        if self.ratios:
            whole, decode = np.exp(np.log(np.asarray(self.ratios[:num_batches])).mean(0))
            self.predicted, self.predicted_decode = float(whole), float(decode)


def predict(
    plain: Record, records: Sequence[Record], curve: Mapping[int, float], num_rows: int, max_nodes: int
) -> list[Candidate]:
    """Every configuration, the best first: predicted speedup = tokens a step x plain step / step.

    ``plain`` is the record of plain decoding on the same batches, in the same order.
    """
    if plain.steps:  # a pass cannot take longer than the step that it is a part of
        pace = min(1.0, median(record.seconds for record in plain.steps) / curve[1])
        curve = {columns: pace * seconds for columns, seconds in curve.items()}
    costs = PassCosts.seeded({num_rows: curve})

    def fitted(record: Record) -> StepSeconds:
        most = max((step.num_columns for answer in record.answers for step in answer.passes), default=1)
        return StepSeconds.fitted(record.steps, costs.curve(num_rows, most), num_rows)

    base = _replay(plain, fitted(plain), partial(_part, size=0))
    candidates = [Candidate(NONE, 0, False, 1.0)]
    for record in records:
        own = fitted(record)
        for size in (size for size in SIZES if size <= max_nodes):
            spec, saved_s = _limited(record, size)
            replayed = _replay(record, own, partial(_part, size=size), saved_s)
            candidates.append(_candidate(spec, size, False, record, replayed, plain, base))
        budget = AdaptiveBudget(max_nodes, PassCosts.seeded({num_rows: curve}))
        replayed = AdaptiveReplay(record, own, fitted(plain), budget).run()
        candidates.append(_candidate(record.spec, max_nodes, True, record, replayed, plain, base))
    return sorted(candidates, key=lambda candidate: -candidate.predicted)


def _candidate(
    spec: str,
    size: int,
    adaptive: bool,
    record: Record,
    replayed: Sequence[Replayed],
    plain: Record,
    base: Sequence[Replayed],
) -> Candidate:
    ratios = []
    for own, own_answer, other, other_answer in zip(replayed, record.answers, base, plain.answers, strict=True):
        (whole, decode), (plain_whole, plain_decode) = own.rates(own_answer), other.rates(other_answer)
        ratios.append((whole / plain_whole, decode / plain_decode if own.tokens and other.tokens else 1.0))
    candidate = Candidate(spec, size, adaptive, 1.0, record, ratios=ratios)
    candidate.expect(len(ratios))
    return candidate


def _limited(record: Record, size: int) -> tuple[str, float]:
    """The drafter that drafts only what a size has room for, and the seconds that this saves in a step."""
    name, options = parse_drafter(record.spec)
    if name != "model" or options.get("shape", "chain") != "chain":
        return record.spec, 0.0
    length = int(options.get("num_tokens", 5))
    if size >= length:
        return record.spec, 0.0
    options["num_tokens"] = size
    return format_drafter(name, options), record.draft_s * (1 - size / length)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of a draft: columns of its pass, and how many accepted tokens."""

    num_columns: int
    num_accepted: int


def _part(draft: Draft, size: int) -> Kept:
    """The best ``size`` nodes, or the first ones of a tree that must not be cut by value."""
    tree, nodes = draft.tree, list(range(1, len(draft.tree)))
    if tree.is_certain and tree.estimates:
        nodes.sort(key=lambda node: -tree.estimates[node])  # stable: a child never outranks its parent
    return Kept(1 + min(size, len(nodes)), len(draft.accepted & set(nodes[:size])))


def _replay(
    record: Record, seconds: StepSeconds, part: Callable[[Draft], Kept], saved_s: float = 0.0
) -> list[Replayed]:
    """Each answer, had each draft been the given part of itself."""
    answers = []
    for answer in record.answers:
        kept = [[part(draft) for draft in step.drafts] for step in answer.passes]
        tokens = [sum(1 + one.num_accepted for one in step) for step in kept]
        spent = [seconds.of(len(step), max(one.num_columns for one in step)) - saved_s for step in kept[1:]]
        answers.append(Replayed(tokens[0], sum(tokens[1:]), sum(spent)))
    return answers
