"""Losslessness of verdicts on a device, by enumeration: the whole loop with the twins of the kernels in it.

Where a twin asks for noise it gets a promise that is kept by walking every branch. Tolerance 1e-6: the twins take
logits and draft probabilities in float32.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from chance import g_test
from enumeration import (
    Law,
    Loop,
    ScriptedNoise,
    ScriptedRowNoise,
    exact_joint,
    product,
    sample_many,
    stepwise_joint,
    total_variation,
)
from exact_cases import Case
from kernel_cases import kernel_cache, simulated  # noqa: F401
from mutants import mutated
from torch import Tensor
from toy import (
    ALL_KINDS,
    CERTAIN,
    CERTAIN_FIRST,
    GROUP_AROUND,
    INDEPENDENT,
    PROMPT,
    TOP_PLUS_ONE,
    TWO_MODELS,
    UNBALANCED,
    WITHOUT_REPLACEMENT,
    ToyTarget,
    chain,
    full,
)

from specdec.cuda import batch_verdicts
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.interfaces import Verdict
from specdec.kernels import pick, reject
from specdec.kernels.pick import Filters, PickedRows, is_kept, pick_rows
from specdec.kernels.rng import COIN, RngKeys
from specdec.rng import PhiloxRng, Rng, Stream
from specdec.sampling import SamplingParams, sampling_probs
from specdec.verifiers import make_verifier

TOLERANCE, FOUND = 1e-6, 1e-3
AS_IT_IS = SamplingParams()
PARAMS = (AS_IT_IS, SamplingParams(0.6, top_k=2), SamplingParams(1.4, top_p=0.8), SamplingParams(min_p=0.3))
MATCHED = {
    "certain chain": Case(CERTAIN, chain(2)),
    "certain <2>": Case(CERTAIN, full(2)),
    "certain unbalanced": Case(CERTAIN, UNBALANCED),
    "independent chain": Case(INDEPENDENT, chain(1)),
}
REJECTED = {
    "certain <2,1>": Case(CERTAIN, full(2, 1)),
    "independent chain": Case(INDEPENDENT, chain(2)),
    "independent <3>": Case(INDEPENDENT, full(3)),
    "two models <2>": Case(TWO_MODELS, full(2)),
    "without replacement <3>": Case(WITHOUT_REPLACEMENT, full(3)),
    "without replacement unbalanced": Case(WITHOUT_REPLACEMENT, UNBALANCED),
    "top plus one <2>": Case(TOP_PLUS_ONE, full(2)),
    "certain first unbalanced": Case(CERTAIN_FIRST, UNBALANCED),
    "group around certain <3>": Case(GROUP_AROUND, full(3)),
    "all kinds <3>": Case(ALL_KINDS, full(3)),
}


# ----- noise that walks every branch -----


@dataclass(frozen=True)
class ScriptedPhilox(PhiloxRng):
    """What the loop takes for the noise of the kernels; drafters draw by the script."""

    seed: int = 0
    script: ScriptedNoise = field(default_factory=lambda: ScriptedNoise([]))

    def at(self, row: int, position: int) -> ScriptedRowNoise:  # type: ignore[override]
        return self.script.at(row, position)


@dataclass(frozen=True)
class GumbelRace:
    """The Gumbel noise of R rows of scores: added to them it makes one token of each the best, with its probability.

    As real noise it belongs to row and position, so nodes of one position share it: one uniform number, which is
    inverted at each. Its values that make a difference are the borders between the tokens of all these nodes.
    """

    script: ScriptedNoise
    keys: list[tuple[int, int]]  # (R,) row and position

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        scores, sample_without_replacement = args
        assert function in (torch.Tensor.add, torch.Tensor.__add__)
        reached = scores.softmax(-1).cumsum(-1).tolist()
        points = {
            key: sample_without_replacement.point(
                [reached[i] for i, other in enumerate(sample_without_replacement.keys) if other == key]
            )
            for key in dict.fromkeys(sample_without_replacement.keys)
        }
        won = torch.full_like(scores, -torch.inf)
        for each, key, sums in zip(won, sample_without_replacement.keys, reached, strict=True):
            each[bisect.bisect(sums, points[key])] = 0.0
        return won

    def point(self, sums: Sequence[Sequence[float]]) -> float:
        """A value between two borders."""
        borders = sorted({0.0, 1.0, *(value for line in sums for value in line if 0 < value < 1 - 1e-12)})
        taken = self.script.choose([b - a for a, b in pairwise(borders)])
        return (borders[taken] + borders[taken + 1]) / 2


@dataclass(frozen=True)
class Word:
    """A random word of one step that becomes a coin, or with a second word a point in a distribution."""

    rng: ScriptedRowNoise
    key: tuple[int, int, int]  # stream, depth, index

    def __add__(self, other: object) -> Word:
        return self

    __mul__ = __add__

    def __lt__(self, ratio: float) -> bool:
        stream, depth, index = self.key
        assert stream == COIN
        return self.rng.bernoulli(ratio, depth, index)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.searchsorted:
            reached, word = args
            stream, depth, index = word.key
            return word.rng.draw(reached.diff(prepend=reached.new_zeros(1)), depth, Stream(stream), index)
        return next(arg for arg in args if isinstance(arg, Word))  # scaled by the whole mass


LATER = 1000  # token LATER + r: what row r of the logits picks is not drawn yet


@dataclass
class Script:
    """The noise of the run that is on.

    Where the walk follows the picks (``is_eager``) all of them are drawn at once. Rejection may emit one of them and
    needs no other: that one is drawn when the verdict is there.
    """

    is_eager: bool
    now: ScriptedNoise = field(default_factory=lambda: ScriptedNoise([]))
    probs: Tensor = field(default_factory=lambda: torch.empty(0))  # (R, V) by which rows pick
    keys: list[tuple[int, int]] = field(default_factory=list)

    def target_gumbel(self, keys: RngKeys, vocab: int) -> GumbelRace | float:
        self.keys = list(zip(keys.rows.tolist(), keys.positions.tolist(), strict=True))
        return GumbelRace(self.now, self.keys) if self.is_eager else 0.0

    def step_words(self, keys: RngKeys, row: int, stream: int, depth: int, index: int) -> tuple[Word, Word]:
        word = Word(self.now.at(int(keys.rows[row]), int(keys.positions[row])), (stream, depth, index))
        return word, word

    def pick_rows(self, logits: Tensor, filters: Filters, rng: RngKeys) -> PickedRows:
        picked = pick_rows(logits, filters, rng)
        raw = logits.double()
        kept = raw.masked_fill(~is_kept(raw, picked.bounds, picked.lasts), -torch.inf)
        self.probs = (kept / filters.temperature).softmax(-1)
        return picked if self.is_eager else replace(picked, tokens=LATER + torch.arange(len(logits)))

    def settled(self, verdict: Verdict) -> Verdict:
        """With the pick that was put off."""
        at = verdict.tokens[-1] - LATER
        if at < 0:
            return verdict
        return replace(verdict, tokens=(*verdict.tokens[:-1], self.now.at(*self.keys[at]).draw(self.probs[at], 0)))


@dataclass(frozen=True, slots=True)
class DeviceLoop(Loop):
    """The loop whose kernels' noise is a script's."""

    script: Script = field(default_factory=lambda: Script(True))
    module: ModuleType = batch_verdicts

    def decoder(self, rng: Rng) -> Decoder:
        assert isinstance(rng, ScriptedNoise)
        self.script.now = rng
        philox = ScriptedPhilox(script=rng)

        def decide(rows: Any, trees: Any, scores: Any, probs: Any) -> list[Verdict]:
            verdicts = self.module.verdicts_on_device(self.verifier, self.logits_transform, philox, rows, trees, scores)
            assert verdicts is not None, "the host was left to decide"
            return [self.script.settled(verdict) for verdict in verdicts]

        return replace(Loop.decoder(self, philox), decide=decide)


Make = Callable[..., DeviceLoop]


@pytest.fixture
def device_loop(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes loops that decide every pass by ``module``, with twins for kernels and a target in float32."""

    def make(
        case: Case, verifier: str, params: SamplingParams = AS_IT_IS, module: ModuleType = batch_verdicts
    ) -> DeviceLoop:
        script = Script(is_eager=verifier == "match")

        monkeypatch.setenv("SPECDEC_KERNELS", "torch")
        monkeypatch.setattr(pick, "target_gumbel", script.target_gumbel)
        monkeypatch.setattr(reject, "step_words", script.step_words)
        monkeypatch.setattr(module, "pick_rows", script.pick_rows)
        drafter, target = case.drafter(), ToyTarget()
        drafter.tables = [table.float().double() for table in drafter.tables]
        target.logits = target.logits.float()
        return DeviceLoop(
            drafter, make_verifier(verifier), target, WarperTransform(params), script=script, module=module
        )

    return make


def law(params: SamplingParams) -> Law:
    return lambda logits, _: sampling_probs(logits.double(), params)


def error(loop: Loop, num_tokens: int = 3, params: SamplingParams = AS_IT_IS) -> float:
    """Total variation between what the loop emits and the target's own distribution."""
    emitted = stepwise_joint(loop, num_tokens)
    return total_variation(emitted, exact_joint(loop.target, PROMPT, num_tokens, law(params)))


def error_of_two_rows(loop: Loop) -> float:
    """The same for rows of equal positions and trees of different size."""
    prompts = (PROMPT, (2, 1))
    alone = [exact_joint(loop.target, prompt, n, law(SamplingParams())) for n, prompt in enumerate(prompts, 1)]
    return total_variation(stepwise_joint(loop, (1, 2), prompts), product(*alone))


# ----- the proof -----


def each_case(*names: str) -> pytest.MarkDecorator:
    pairs = [("match", name, case) for name, case in MATCHED.items()]
    pairs += [("rejection", name, case) for name, case in REJECTED.items()]
    chosen = [pair for pair in pairs if not names or pair[1] in names]
    ids = [f"{verifier}-{name}" for verifier, name, _ in chosen]
    return pytest.mark.parametrize(("verifier", "case"), [(v, case) for v, _, case in chosen], ids=ids)


@each_case()
def test_the_joint_distribution_of_several_tokens_is_the_targets(verifier: str, case: Case, device_loop: Make) -> None:
    assert error(device_loop(case, verifier)) <= TOLERANCE


@pytest.mark.parametrize("params", PARAMS, ids=str)
@each_case("certain <2>", "independent chain", "without replacement unbalanced")
def test_it_is_so_under_temperature_top_k_top_p_and_min_p(
    verifier: str, case: Case, params: SamplingParams, device_loop: Make
) -> None:
    assert error(device_loop(case, verifier, params), 2, params) <= TOLERANCE


@each_case("certain chain", "independent chain", "without replacement unbalanced")
def test_rows_of_one_batch_are_independent(verifier: str, case: Case, device_loop: Make) -> None:
    """Guards rows that share noise, and padding that takes part."""
    assert error_of_two_rows(device_loop(case, verifier)) <= TOLERANCE


MUTATIONS = {
    "one number for all depths": ("(positions[:, None] + depths)", "(positions[:, None] + 0 * depths)"),
    "one number for all rows": ("keys.repeat(num_nodes),", "0 * keys.repeat(num_nodes),"),
    "padding below the root": (
        "tree.parents for tree in trees], num_nodes, -1)",
        "tree.parents for tree in trees], num_nodes, 0)",
    ),
    "all nodes drawn from the first row": (
        "[tree.sources for tree in trees]",
        "[[0] * len(tree.sources) for tree in trees]",
    ),
    "the other way to draw": ("draw is Draw.WITHOUT_REPLACEMENT", "draw is Draw.INDEPENDENT"),
    "the draft's mass of another token": ("tree.draft_probs.to(nothing)", "tree.draft_probs.to(nothing).roll(1, -1)"),
    "no temperature": ("Filters(params.temperature,", "Filters(1.0,"),
    "no top-k": ("params.top_k", "0"),
    "no top-p": ("params.top_p", "1.0"),
    "no min-p": ("params.min_p", "0.0"),
    "the first node's logits for all": (
        "pick_rows(self.logits.flatten(0, 1)",
        "pick_rows(self.logits[:, :1].repeat(1, self.logits.shape[1], 1).flatten(0, 1)",
    ),
    "another last token": ("tuple(tokens[: len(nodes)])", "(*tokens[: len(nodes) - 1], 0)"),
}
JUDGES = [
    (MATCHED["certain chain"], "match"),
    *((REJECTED[name], "rejection") for name in ("independent chain", "two models <2>", "without replacement <3>")),
]


def is_found(module: ModuleType, device_loop: Make) -> bool:
    """Whether some case of the proof rejects verdicts by ``module``."""
    try:
        return (
            any(error(device_loop(*judge, AS_IT_IS, module), 2) > FOUND for judge in JUDGES)
            or any(error(device_loop(*JUDGES[0], params, module), 2, params) > FOUND for params in PARAMS)
            or any(error_of_two_rows(device_loop(*judge, AS_IT_IS, module)) > FOUND for judge in JUDGES[:2])
        )
    except (AssertionError, IndexError):  # noise used twice, or a path that is none
        return True


def test_the_judge_lets_the_right_one_pass(device_loop: Make) -> None:
    assert not is_found(batch_verdicts, device_loop)


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_part_of_a_batch_matters(name: str, device_loop: Make) -> None:
    """Guards the proof itself: a change that it would not notice is a hole in it."""
    assert is_found(mutated(batch_verdicts, *MUTATIONS[name]), device_loop)


# ----- the noise itself -----


@pytest.mark.parametrize("backend", ["torch", "sim"])
@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_many_runs_fit_the_target(
    verifier: str, backend: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Guards what enumeration cannot: noise that is used twice. G-test; false alarm odds 1e-6 (the seed is fixed)."""
    if backend == "sim":
        request.getfixturevalue("simulated")
    monkeypatch.setenv("SPECDEC_KERNELS", backend)
    target, drafter = ToyTarget(), REJECTED["without replacement unbalanced"].drafter()
    target.logits = target.logits.float()
    loop = Loop(drafter, make_verifier(verifier), target)
    observed = list(sample_many(loop, PhiloxRng(2024), 3, 2000 if backend == "torch" else 400, 100))
    expected = exact_joint(target, PROMPT, 3, law(SamplingParams()))
    assert g_test(observed, expected) > 1e-6
    assert g_test(observed, exact_joint(ToyTarget(2), PROMPT, 3)) < 1e-6, "so many runs tell targets apart"
