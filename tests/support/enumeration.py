"""Losslessness without statistics: noise that walks every branch, and the exact distribution of the whole decode loop."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import Tensor
from toy import PROMPT, Tokens, ToyTarget, context

from specdec.budget.adaptive import FixedBudget
from specdec.decode import Decoder
from specdec.distributions import LogitsTransform, WarperTransform
from specdec.interfaces import Drafter, Row, Verifier
from specdec.rng import Rng, Stream
from specdec.sampling import SamplingParams
from specdec.settings import DEFAULTS

Law = Callable[[Tensor, Sequence[int]], Tensor]  # raw logits (V,) and all tokens before -> probabilities (V,)
Outcome = TypeVar("Outcome", bound=Hashable)


class NoiseReuseError(AssertionError):
    """The same random number was asked for twice: the second answer would not be independent of the first."""


@dataclass(slots=True)
class _Branch:
    """A point where chance decides: its options, and the one now taken."""

    probs: list[float]
    taken: int = 0


class ScriptedNoise:
    """Noise that replays a script of choices, takes the first option behind its end, and records where it branched.

    With ``strict`` (the default) a random number may be asked for once only. Without, coins behave as PhiloxRng's do:
    the same question compares the same uniform number, which the interval of values still possible stands for.
    """

    def __init__(self, script: list[_Branch], *, strict: bool = True) -> None:
        self.script = script
        self.strict = strict
        self.probability = 1.0
        self.used: set[tuple[int, ...]] = set()
        self.coins: dict[tuple[int, ...], tuple[float, float]] = {}
        self._next = 0

    def at(self, row: int, position: int) -> ScriptedRowNoise:
        return ScriptedRowNoise(self, row, position)

    def choose(self, probs: list[float]) -> int:
        """The option taken here; one option alone is no branch."""
        if len(probs) == 1:
            return 0
        if self._next == len(self.script):
            self.script.append(_Branch(probs))
        branch = self.script[self._next]
        assert branch.probs == probs, "the code under test is not a function of its noise"
        self._next += 1
        self.probability *= probs[branch.taken]
        return branch.taken

    def use(self, key: tuple[int, ...]) -> None:
        if key in self.used and self.strict:
            raise NoiseReuseError(f"(row, position, stream, depth, index) = {key} was used before")
        self.used.add(key)


@dataclass(frozen=True, slots=True)
class ScriptedRowNoise:
    """One row's share of :class:`ScriptedNoise`, keyed as PhiloxRng keys its numbers."""

    rng: ScriptedNoise
    row: int
    position: int

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        values: list[float] = probs.tolist()
        support = [token for token, value in enumerate(values) if value > 0]
        assert support, f"nothing can be drawn from {values}"
        assert all(value >= 0 for value in values), f"not a distribution: {values}"
        if len(support) > 1:
            target = stream is Stream.TARGET
            self.rng.use(
                (self.row, self.position + depth, 0) if target else (self.row, self.position, stream, depth, index)
            )
        total = math.fsum(values)
        return support[self.rng.choose([values[token] / total for token in support])]

    def sample_without_replacement(self, probs: Tensor, count: int, depth: int, index: int = 0) -> list[int]:
        self.rng.use((self.row, self.position, Stream.DRAFT, depth, index))
        left, drawn = {token: value for token, value in enumerate(probs.tolist()) if value > 0}, list[int]()
        while left and len(drawn) < count:
            total = math.fsum(left.values())
            drawn.append(list(left)[self.rng.choose([value / total for value in left.values()])])
            del left[drawn[-1]]
        return drawn

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        assert not math.isnan(prob), "a coin was asked for with probability NaN"
        if prob <= 0 or prob >= 1:
            return prob > 0
        key = (self.row, self.position, Stream.COIN, depth, index)
        self.rng.use(key)
        low, high = self.rng.coins.get(key, (0.0, 1.0))
        if prob <= low or prob >= high:
            return prob > low
        heads = (prob - low) / (high - low)
        is_heads = self.rng.choose([heads, 1 - heads]) == 0
        self.rng.coins[key] = (low, prob) if is_heads else (prob, high)
        return is_heads


def enumerate_outcomes(run: Callable[[ScriptedNoise], Outcome], *, strict: bool = True) -> dict[Outcome, float]:
    """The exact distribution of what ``run`` returns: every branch of its randomness is walked, nothing is sampled."""
    outcomes = defaultdict[Outcome, float](float)
    script = list[_Branch]()
    while True:
        rng = ScriptedNoise(script, strict=strict)
        outcomes[run(rng)] += rng.probability
        while script and script[-1].taken == len(script[-1].probs) - 1:
            script.pop()
        if not script:
            return dict(outcomes)
        script[-1].taken += 1


@dataclass(frozen=True, slots=True)
class Loop:
    """One configuration of the decode loop, whose noise is still open."""

    drafter: Drafter
    verifier: Verifier
    target: ToyTarget = field(default_factory=ToyTarget)
    logits_transform: LogitsTransform = field(default_factory=lambda: WarperTransform(SamplingParams()))
    stop_token: int | None = None
    max_nodes: int = DEFAULTS.max_nodes

    def decoder(self, rng: Rng) -> Decoder:
        return Decoder(
            target=self.target,
            drafter=self.drafter,
            verifier=self.verifier,
            logits_transform=self.logits_transform,
            rng=rng,
            stop=lambda row: row.tokens[-1] == self.stop_token,
            budget=FixedBudget(self.max_nodes),
            clock=lambda: 0.0,
        )

    def generate(self, rng: Rng, num_tokens: int, prompts: Sequence[Tokens] = (PROMPT,)) -> list[Tokens]:
        """What each row emits in one run of the whole loop."""
        rows = [Row(key, list(prompt), len(prompt) + num_tokens) for key, prompt in enumerate(prompts)]
        for _ in self.decoder(rng).run(rows):
            pass
        return [tuple(row.tokens[row.num_prompt :]) for row in rows]


def first_step(loop: Loop, prompt: Tokens = PROMPT, num_left: int = 9) -> dict[Hashable, float]:
    """The exact distribution of what the first pass does for one row: accepted nodes and emitted tokens."""

    def step(rng: Rng) -> tuple[Tokens, Tokens]:
        rows = [Row(0, list(prompt), len(prompt) + num_left)]
        loop.target.open(rows)
        loop.drafter.begin(rows)
        done = loop.decoder(rng).step(rows)[0].step
        return done.nodes[1:], done.tokens

    return {**enumerate_outcomes(step)}


def whole_joint(loop: Loop, num_tokens: int) -> dict[Hashable, float]:
    """The exact joint distribution of what one row emits, by walking every branch of whole runs."""
    return {**enumerate_outcomes(lambda rng: loop.generate(rng, num_tokens)[0])}


def stepwise_joint(
    loop: Loop, num_tokens: int | Sequence[int], prompts: Sequence[Tokens] = (PROMPT,), *, strict: bool = True
) -> dict[Hashable, float]:
    """As ``whole_joint``, for any number of rows: runs that emitted the same tokens so far are continued together.

    That is the same distribution, because the toy target, drafters and verifiers keep no state beside the tokens and
    every step's noise is fresh; it costs the sum of the steps' branches and not their product.
    """
    counts = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else list(num_tokens)

    def step(state: tuple[Tokens, ...], rng: Rng) -> tuple[Tokens, ...]:
        rows = list[Row]()
        for key, (prompt, emitted) in enumerate(zip(prompts, state, strict=True)):
            rows.append(Row(key, list(prompt), len(prompt) + counts[key]))
            rows[-1].tokens += emitted
        active = [row for row in rows if not _is_finished(row, loop.stop_token)]
        loop.target.open(active)
        loop.drafter.begin(active)
        emissions = loop.decoder(rng).step(active)
        assert all(e.step.finished == _is_finished(e.row, loop.stop_token) for e in emissions)
        return tuple(tuple(row.tokens[row.num_prompt :]) for row in rows)

    def finished(state: tuple[Tokens, ...]) -> bool:
        return all(len(t) == n or t[-1:] == (loop.stop_token,) for t, n in zip(state, counts, strict=True))

    joint = defaultdict[Hashable, float](float)
    frontier: dict[tuple[Tokens, ...], float] = {((),) * len(prompts): 1.0}
    while frontier:
        state = min(frontier, key=lambda s: sum(map(len, s)))
        mass = frontier.pop(state)
        for after, prob in enumerate_outcomes(partial(step, state), strict=strict).items():
            if finished(after):
                joint[after if len(prompts) > 1 else after[0]] += mass * prob
            else:
                frontier[after] = frontier.get(after, 0.0) + mass * prob
    return dict(joint)


def _is_finished(row: Row, stop_token: int | None) -> bool:
    return row.num_left <= 0 or (row.num_emitted > 0 and row.tokens[-1] == stop_token)


def softmax_law(logits: Tensor, history: Sequence[int]) -> Tensor:
    return logits.softmax(-1)


def exact_joint(
    target: ToyTarget,
    prompt: Tokens = PROMPT,
    num_tokens: int = 3,
    law: Law = softmax_law,
    stop_token: int | None = None,
) -> dict[Hashable, float]:
    """What plain sampling from the target emits: the product rule, with no code of ours but the table."""
    joint: dict[Hashable, float] = {}
    waiting: list[tuple[Tokens, float]] = [((), 1.0)]
    while waiting:
        emitted, mass = waiting.pop()
        if len(emitted) == num_tokens or emitted[-1:] == (stop_token,):
            joint[emitted] = mass
            continue
        history = prompt + emitted
        probs = law(target.logits[context(history, target.vocab)].clone(), history).tolist()
        waiting += [((*emitted, token), mass * prob) for token, prob in enumerate(probs) if prob > 0]
    return joint


def product(*joints: dict[Hashable, float]) -> dict[Hashable, float]:
    """The joint distribution of independent rows."""
    result: dict[tuple[Hashable, ...], float] = {(): 1.0}
    for joint in joints:
        result = {(*a, b): x * y for a, x in result.items() for b, y in joint.items()}
    return dict(result.items())


def total_variation(a: dict[Hashable, float], b: dict[Hashable, float]) -> float:
    return 0.5 * math.fsum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys())


def sample_many(loop: Loop, rng: Rng, num_tokens: int, num_rows: int, batch: int = 64) -> Iterator[Tokens]:
    """What ``num_rows`` rows emit, each with its own key, in batches."""
    rows = [Row(key, list(PROMPT), len(PROMPT) + num_tokens) for key in range(num_rows)]
    for _ in loop.decoder(rng).run(rows, batch):
        pass
    return (tuple(row.tokens[row.num_prompt :]) for row in rows)
