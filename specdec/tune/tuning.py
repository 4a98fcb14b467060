"""Finds what is fastest for a target, its prompts and this machine: measure costs, record drafts, predict, then race.

Prediction replays recorded drafts under every tree size and cost curve, which takes no passes of the target; only the
few best are then run on real prompts, in turn and in pairs. "none" always takes part. Seconds are wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np

from specdec.budget.adaptive import AdaptiveBudget, Budget, FixedBudget, make_budget
from specdec.budget.calibration import Calibration
from specdec.budget.costs import PassCosts
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters import format_drafter, make_drafter, parse_drafter
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import DraftContext, Drafter, Row, Verdict, Verifier
from specdec.rng import PhiloxRng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree

COLUMNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MODEL_CHAINS = ("model:num_tokens=8,min_confidence=0.0", "model")
MODEL_TREES = ("model:shape=best-first", "model:shape=3x2x1")
NONE = "none"
_MIN_VISITS = 5
_ADAPTIVE_BONUS = 1.03
_NUM_RESAMPLES = 1000

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a decoder is made of, besides drafter and budget."""

    engine: CausalLM
    verifier: Verifier
    draft_models: tuple[Any, ...]
    params: SamplingParams
    eos_ids: frozenset[int]
    max_new_tokens: int
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter

    def drafter(self, spec: str) -> Drafter:
        return make_drafter(spec, DraftContext(self.engine, self.verifier, self.draft_models))

    def decoder(self, drafter: Drafter, budget: Budget) -> Decoder:
        rng, logits_transform = PhiloxRng(self.seed), WarperTransform(self.params)
        return Decoder(self.engine, drafter, self.verifier, logits_transform, rng, self._is_at_end, budget, self.clock)

    def rows(self, prompts: Sequence[Tokens]) -> list[Row]:
        return [Row(i, list(ids), len(ids) + self.max_new_tokens) for i, ids in enumerate(prompts)]

    def _is_at_end(self, row: Row) -> bool:
        return row.tokens[-1] in self.eos_ids


def measure_curve(
    setting: Setting, prompts: Sequence[Tokens], columns: Sequence[int] = COLUMNS, rounds: int = 7
) -> dict[int, float]:
    """Seconds of one pass for all ``prompts`` by columns: sizes in turn, the median, the first round being warm-up."""
    engine, rng = setting.engine, np.random.default_rng(0)
    rows = [Row(i, list(ids), len(ids) + rounds * len(columns) + 64) for i, ids in enumerate(prompts)]
    times: dict[int, list[float]] = {size: [] for size in columns}
    engine.open(rows)
    try:
        for size in (1, *(size for _ in range(rounds) for size in columns)):
            trees = [_random_tree(row.tokens[-1], size, engine, rng) for row in rows]
            is_prompt = rows[0].num_steps == 0
            started = setting.clock()
            scores = engine.score(rows, trees)
            float(scores[-1].logits[0, 0])  # waits for a GPU
            if not is_prompt:
                times[size].append(setting.clock() - started)
            engine.commit(rows, [(0,)] * len(rows))
            for row in rows:
                row.tokens.append(int(rng.integers(min(engine.vocab_size, 1000))))
                row.num_steps += 1
    finally:
        engine.close(rows)
    return {size: median(each[1:]) for size, each in times.items()}


def _random_tree(root: int, size: int, engine: CausalLM, rng: np.random.Generator) -> TokenTree:
    parents = [-1, *(node - 1 if engine.chain_only else int(rng.integers(node)) for node in range(1, size))]
    tokens = rng.permutation(min(engine.vocab_size, 1000))[: size - 1].tolist()
    return TokenTree((root, *(int(token) for token in tokens)), tuple(parents))


@dataclass(frozen=True, slots=True)
class Draft:
    """What was proposed for one row in one step, and the nodes of it that were accepted, the root included."""

    tree: TokenTree
    accepted: frozenset[int]


@dataclass(slots=True)
class Recorder(FixedBudget):
    """A budget that lets everything through and writes down what came of it."""

    steps: list[tuple[list[Draft], float]] = field(default_factory=list)  # of all rows; seconds of drafting

    def learn(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        verdicts: Sequence[Verdict],
        draft_s: float,
        pass_s: float,
    ) -> None:
        if all(row.num_steps > 1 for row in rows):  # a row's first pass holds its prompt
            drafts = [Draft(tree, frozenset(v.nodes)) for tree, v in zip(trees, verdicts, strict=True)]
            self.steps.append((drafts, draft_s))


@dataclass(frozen=True, slots=True)
class Record:
    """What one drafter did on the prompts at the largest size."""

    spec: str
    steps: list[tuple[list[Draft], float]]
    host_s: float  # verification and bookkeeping of one step

    @property
    def draft_s(self) -> float:
        return median([seconds for _, seconds in self.steps] or [0.0])

    def acceptance_table(self) -> list[list[float]]:
        """[depth][rank]: how often the child of that rank was accepted below an accepted node of that depth."""
        visits: dict[int, int] = {}
        hits: dict[int, dict[int, int]] = {}
        for drafts, _ in self.steps:
            for draft in drafts:
                children, depths = draft.tree.children(), draft.tree.depths()
                for node in draft.accepted:
                    if children[node]:
                        visits[depths[node]] = visits.get(depths[node], 0) + 1
                    for rank, child in enumerate(children[node]):
                        if child in draft.accepted:
                            below = hits.setdefault(depths[node], {})
                            below[rank] = below.get(rank, 0) + 1
        table: list[list[float]] = []
        while visits.get(len(table), 0) >= _MIN_VISITS:
            found = hits.get(len(table), {})
            ranks = range(max(found, default=0) + 1)
            table.append([found.get(rank, 0) / visits[len(table)] for rank in ranks])
        return table


def record(setting: Setting, spec: str, batches: Sequence[Sequence[Tokens]], max_nodes: int) -> Record:
    """Run ``spec`` at the largest size over ``batches``."""
    recorder, hosts = Recorder(max_nodes), list[float]()
    decoder = setting.decoder(setting.drafter(spec), recorder)
    for prompts in batches:
        hosts += [e.step.verify_s * e.step.num_rows for e in decoder.run(setting.rows(prompts)) if e.step.index > 0]
    return Record(spec, recorder.steps, median(hosts or [0.0]))


@dataclass(slots=True)
class Candidate:
    """One configuration, what it should bring and what it brought."""

    drafter: str
    max_nodes: int
    adaptive: bool
    predicted: float
    record: Record | None = None
    measured: tuple[float, float, float] | None = None  # speedup against "none", with its 95 % interval
    is_dropped: bool = False  # the race was over for it early

    def __str__(self) -> str:
        return self.drafter if self.drafter == NONE else f"{self.drafter} {self.size}"

    @property
    def size(self) -> str:
        return f"{'adaptive, up to' if self.adaptive else 'always'} {self.max_nodes} nodes"


def predict(records: Sequence[Record], curve: Mapping[int, float], num_rows: int, max_nodes: int) -> list[Candidate]:
    """Every configuration, the best first: predicted speedup = tokens a step x plain step / step."""
    costs = PassCosts.seeded({num_rows: curve})
    plain_s = curve[1] + min((r.host_s for r in records), default=0.0)
    found = [Candidate(NONE, 0, False, 1.0)]
    for each in records:
        for size in (size for size in SIZES if size <= max_nodes):
            spec, draft_s = _limited(each, size)
            tokens, seconds = _replay(each, num_rows, costs, partial(_part, size=size))
            found.append(Candidate(spec, size, False, tokens * plain_s / (seconds + draft_s + each.host_s), each))
        budget = AdaptiveBudget(max_nodes, costs, _calibrated(each))
        tokens, seconds = _replay(each, num_rows, costs, partial(_cut, budget=budget, num_rows=num_rows))
        step_s = seconds + each.draft_s + each.host_s
        found.append(Candidate(each.spec, max_nodes, True, max(1.0, tokens * plain_s / step_s), each))
    return sorted(found, key=lambda candidate: -candidate.predicted)


def _limited(each: Record, size: int) -> tuple[str, float]:
    """The drafter that drafts only what a size has room for, and its seconds: a model's chain costs by its length."""
    name, options = parse_drafter(each.spec)
    if name != "model" or options.get("shape", "chain") != "chain":
        return each.spec, each.draft_s
    length = int(options.get("num_tokens", 5))
    if size >= length:
        return each.spec, each.draft_s
    options["num_tokens"] = size
    return format_drafter(name, options), each.draft_s * size / length


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


def _cut(draft: Draft, budget: AdaptiveBudget, num_rows: int) -> Kept:
    """What the budget leaves of a draft where all rows have such a one."""
    rows = [Row(i, [0], 1) for i in range(num_rows)]
    tree = budget.cut(rows, [draft.tree] * num_rows)[0]
    if len(tree) == len(draft.tree):
        return Kept(len(tree), len(draft.accepted) - 1)
    known = {tuple(tree.path_tokens(node)) for node in range(1, len(tree))}
    return Kept(len(tree), sum(tuple(draft.tree.path_tokens(node)) in known for node in draft.accepted if node))


def _replay(each: Record, num_rows: int, costs: PassCosts, part: Callable[[Draft], Kept]) -> tuple[float, float]:
    """Mean tokens a row and mean seconds of a pass, had each draft been the given part of itself."""
    most = 1 + max((len(d.tree) for drafts, _ in each.steps for d in drafts), default=1)
    curve = costs.curve(num_rows, most)
    kept = [[part(draft) for draft in drafts] for drafts, _ in each.steps]
    if not kept:
        return 1.0, curve[0]
    tokens = mean(1 + mean(one.num_accepted for one in step) for step in kept)
    return tokens, mean(curve[max(one.num_columns for one in step) - 1] for step in kept)


def _calibrated(each: Record) -> Calibration:
    calibration = Calibration()
    for drafts, _ in each.steps:
        for draft in drafts:
            if draft.tree.estimates:
                for node in range(1, len(draft.tree)):
                    calibration.learn(draft.tree.estimates[node], node in draft.accepted)
    return calibration


def finalists(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best ``count`` of the best of each drafter, once adaptive and once fixed; "none" is always among them.

    Prediction errs more between drafters than between sizes of one: so no drafter takes all places.
    """
    firsts: dict[tuple[str, bool], Candidate] = {}
    for each in candidates:
        if each.drafter != NONE:
            firsts.setdefault((each.drafter, each.adaptive), each)
    return [next(c for c in candidates if c.drafter == NONE), *list(firsts.values())[: count - 1]]


def race(
    setting: Setting,
    racers: Sequence[Candidate],
    batches: Sequence[Sequence[Tokens]],
    curve: Mapping[int, float],
    is_over: Callable[[], bool] = lambda: False,
) -> Candidate:
    """Run each batch with every racer in turn until batches or time run out, and return the fastest.

    A racer drops out when the 95 % bootstrap interval of its paired ratio to the leader lies wholly below 1. Results
    are left in ``racers``; the first one must be "none", with which all are compared.
    """
    num_rows = max(map(len, batches))
    decoders = [
        setting.decoder(
            setting.drafter(each.drafter),
            make_budget(each.max_nodes, each.adaptive, PassCosts.seeded({num_rows: curve})),
        )
        for each in racers
    ]
    rates: list[list[float]] = [[] for _ in racers]  # logarithms of tokens a second
    for number, prompts in enumerate(batches):
        order = [(number + i) % len(racers) for i in range(len(racers))]
        for i in (i for i in order if not racers[i].is_dropped):
            rows = setting.rows(prompts)
            started = setting.clock()
            for _ in decoders[i].run(rows):
                pass
            seconds = max(setting.clock() - started, 1e-9)
            rates[i].append(float(np.log(sum(row.num_emitted for row in rows) / seconds)))
        _judge(racers, rates)
        if is_over() or (sum(not each.is_dropped for each in racers) == 1):
            break
    left = [each for each in racers if not each.is_dropped]
    return max(left, key=_merit)


def _merit(each: Candidate) -> float:
    """Its speed; of nearly equal ones the adaptive is taken, which follows other prompts than these too."""
    return (each.measured[0] if each.measured else 0.0) * (_ADAPTIVE_BONUS if each.adaptive else 1.0)


def _judge(racers: Sequence[Candidate], rates: Sequence[Sequence[float]]) -> None:
    for each, own in zip(racers, rates, strict=True):
        if not each.is_dropped:
            each.measured = _ratio(own, rates[0])
    active = [i for i, each in enumerate(racers) if not each.is_dropped]
    leader = max(active, key=lambda i: mean(rates[i]))
    for i in active:
        # "none" stays: everybody is compared with it.
        if i not in (0, leader) and len(rates[i]) >= 4 and _ratio(rates[i], rates[leader])[2] < 1:
            racers[i].is_dropped = True


def _ratio(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of paired ratios and its 95 % bootstrap interval."""
    logs = np.asarray(own) - np.asarray(other[: len(own)])
    picks = np.random.default_rng(0).integers(len(logs), size=(_NUM_RESAMPLES, len(logs)))
    low, high = np.exp(np.percentile(logs[picks].mean(1), [2.5, 97.5]))
    return float(np.exp(logs.mean())), float(low), float(high)
