"""Whole runs of the real decode loop in simulated time: what is booked is what the loop books.

A target and a drafter whose tokens are known stand behind the real protocols, and passes, drafts and disturbances cost
what a `World` says; the decoder's clock only adds these up. Seconds are plain passes of one short row. A run's score
(`Result.work`) counts what the decisions cost: passes and drafts at their true price, neither prompts nor hiccups, which
hit every size alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from specdec.budget.adaptive import AdaptiveBudget, Budget, FixedBudget
from specdec.budget.costs import PassCosts
from specdec.decode import Decoder
from specdec.interfaces import Limit, Row, Scores, Verdict
from specdec.rng import PhiloxRng, Rng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import Draw, TokenTree
from specdec.verifiers.match import MatchVerifier

SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16)
_VOCAB = 1000

PassSeconds = Callable[[int, int, float], float]  # rows, columns, tokens of context -> seconds


@dataclass(frozen=True)
class Machine:
    """Seconds of a pass: weights are read once, tokens beyond ``free`` cost arithmetic, caches are read by every row.

    ``jump`` is what a second column costs at once (another kernel); ``per_cell`` the attention of one more column over
    one token of context.
    """

    free: float = 16.0
    per_token: float = 0.03
    jump: float = 0.0
    per_context: float = 1e-5
    per_cell: float = 1e-6

    def __call__(self, rows: int, columns: int, context: float) -> float:
        tokens = rows * columns
        arithmetic = self.per_token * max(0.0, tokens - self.free) + self.jump * (columns > 1)
        return 1 + arithmetic + rows * context * (self.per_context + self.per_cell * columns)


FLAT = Machine(free=1e9, per_context=0.0, per_cell=0.0)
CPU = Machine(free=1, per_token=0.025)
CPU_JUMP = Machine(free=1, per_token=0.04, jump=0.7)
GPU = Machine(free=256, per_token=0.004)
LONG_TEXT = Machine(per_context=2e-4)  # a text of 8000 tokens takes 2.6 times a short one
MACHINES = (FLAT, CPU, CPU_JUMP, GPU, Machine(free=64, per_token=0.01), Machine(free=1, per_token=0.1))


@dataclass(frozen=True)
class Drafts:
    """What a drafter proposes. Each token of the text is one that it knows with ``rate``, in a share ``hit_share`` of
    stretches of 20 tokens; elsewhere it knows none. ``believed`` is what it says of each (None: nothing).

    Args:
        kind: "certain" or "drawn".
        width: candidates of a level; the first is the right one if the token is known.
        level_s, base_s: seconds of a level and of a draft, in plain passes of one short row.
        prompt_s: seconds for each token that it has not processed yet, as with a draft model.
        observe_s: seconds, in plain passes of one short row, of looking at what became of a draft.
        rates: (share of the text, rate) from which on another rate holds.
    """

    rate: float = 0.8
    believed: float | None = 0.8
    hit_share: float = 1.0
    kind: str = "certain"
    width: int = 1
    length: int = 16
    level_s: float = 0.0
    base_s: float = 0.002
    prompt_s: float = 0.0
    observe_s: float = 0.0
    believed_bad: float = 0.05
    rates: tuple[tuple[float, float], ...] = ()


@dataclass
class World:
    """The clock, and everything that moves it.

    Args:
        noise: standard deviation of the logarithm of what the clock shows for a pass or a draft.
        spikes: pass -> seconds that it takes longer (a hiccup, a capture).
        slow: (first pass, number of passes, factor) of times in which everything takes longer.
        drift: share of the text -> factor of all costs, which is true and counts.
        is_async: the device works while the host goes on; who looks at a number waits.
        first_s: seconds that the first pass of each power of two of columns takes longer: captures, compilation.
    """

    machine: PassSeconds
    noise: float = 0.0
    spikes: dict[int, float] = field(default_factory=dict)
    slow: tuple[tuple[int, int, float], ...] = ()
    drift: Callable[[float], float] = lambda share: 1.0
    is_async: bool = False
    first_s: float = 0.0
    seed: int = 0
    now: float = 0.0
    work: float = 0.0
    num_passes: int = 0
    progress: float = 0.0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self._pending = 0.0
        self._seen: set[int] = set()

    def spend(self, seconds: float, *, counts: bool = True, on_device: bool = False, extra: float = 0.0) -> None:
        seconds *= self.drift(self.progress)
        if counts:
            self.work += seconds
        shown = seconds * self._factor() * np.exp(self.noise * self.random.standard_normal()) + extra
        if on_device and self.is_async:
            self.now += 0.05
            self._pending = float(shown)
        else:
            self.now += float(shown)

    def score(self, rows: int, columns: int, context: float, *, is_first: bool) -> None:
        extra = self.spikes.get(self.num_passes, 0.0)
        bucket = (columns - 1).bit_length()
        if bucket not in self._seen:
            self._seen.add(bucket)
            extra += self.first_s
        self.num_passes += 1
        self.spend(self.machine(rows, columns, context), counts=not is_first, on_device=True, extra=extra)
        if is_first:
            self._pending += 10.0

    def wait(self) -> None:
        self.now += self._pending
        self._pending = 0.0

    def _factor(self) -> float:
        factor = 1.0
        for first, count, times in self.slow:
            if first <= self.num_passes < first + count:
                factor *= times
        return factor


@dataclass
class Text:
    """The tokens of one row and which of them the drafter knows."""

    knows: np.ndarray  # (L,) uniform numbers
    stretch: np.ndarray  # (L,)


@dataclass
class _Known:
    """What the target says at each node: the row's text goes on, whatever was drafted."""

    row: Row
    depths: list[int]
    world: World
    is_greedy: bool = True

    def best(self, node: int) -> int:
        self.world.wait()
        return (len(self.row.tokens) + self.depths[node]) % _VOCAB

    def probs(self, node: int) -> torch.Tensor:
        raise AssertionError("greedy")


@dataclass
class _Policy:
    world: World
    params: SamplingParams = GREEDY

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> _Known:
        return _Known(row, tree.depths() if len(tree) > 1 else [0], self.world)


@dataclass
class SimulatedTarget:
    world: World
    chain_only: bool = False
    vocab_size: int = 2**31
    max_columns: list[int] = field(default_factory=list)

    def open(self, rows: Sequence[Row]) -> None: ...

    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[Scores]:
        world = self.world
        columns = max(map(len, trees))
        world.progress = float(np.mean([row.num_emitted / (row.max_tokens - row.num_prompt) for row in rows]))
        context = float(np.mean([len(row.tokens) for row in rows]))
        world.score(len(rows), columns, context, is_first=any(row.num_steps == 0 for row in rows))
        self.max_columns.append(columns)
        return [Scores(_NOTHING)] * len(rows)

    def commit(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> None:
        self.world.wait()

    def close(self, rows: Sequence[Row]) -> None: ...


_NOTHING = torch.zeros(1, 1)


@dataclass
class SimulatedDrafter:
    world: World
    drafts: Drafts
    seed: int = 0
    name: str = "simulated"
    drafted: list[int] = field(default_factory=list)
    _texts: dict[Row, Text] = field(default_factory=dict)
    _read: dict[Row, int] = field(default_factory=dict)

    def begin(self, rows: Sequence[Row]) -> None:
        for row in rows:
            random = np.random.default_rng((self.seed, row.key))
            length = row.max_tokens + 64
            knows = random.random(length)
            # All rows are hard to draft for at the same time: else the unluckiest one decides how long a batch takes.
            hard = np.random.default_rng(self.seed).random((row.max_tokens - row.num_prompt) // 20 + 5)
            stretch = np.concatenate([np.zeros(row.num_prompt), np.repeat(hard, 20)])
            self._texts[row] = Text(knows, stretch)
            self._read[row] = 0

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        trees = [self._tree(row, limit) for row, limit in zip(rows, limits, strict=True)]
        deepest = max(max(tree.depths()) for tree in trees) if any(len(t) > 1 for t in trees) else 0
        d = self.drafts
        if deepest:
            unread = 0
            for row, tree in zip(rows, trees, strict=True):
                if len(tree) > 1:
                    unread = max(unread, len(row.tokens) - self._read[row])
                    self._read[row] = len(row.tokens)
            # Catching up on a few tokens is part of the first level's pass.
            self.world.spend(0.0, counts=False, extra=d.prompt_s * max(0, unread - 32))
            self.world.spend((d.base_s + d.level_s * deepest) * self.world.machine(len(rows), 1, 0.0))
        self.drafted.append(max(map(len, trees)) - 1)
        return trees

    def _tree(self, row: Row, limit: Limit) -> TokenTree:
        d = self.drafts
        levels = limit.num_levels if d.level_s else limit.depth
        levels = max(0, min(levels, d.length, -(-limit.nodes // d.width)))
        if levels == 0 or limit.nodes == 0:
            return TokenTree.root(row.tokens[-1])
        text, start = self._texts[row], len(row.tokens)
        tokens, parents, values, sources = [row.tokens[-1]], [-1], [1.0], [-1]
        spine, value = 0, 1.0
        for depth in range(levels):
            place = start + depth
            is_good = text.stretch[place] < d.hit_share
            right = is_good and text.knows[place] < self._rate(row, place)
            value *= (d.believed if is_good else d.believed_bad) if d.believed is not None else 1.0
            above = spine
            for k in range(d.width):
                if len(tokens) > limit.nodes:
                    break
                tokens.append((place + (0 if right and k == 0 else 1 + k)) % _VOCAB)
                parents.append(above)
                sources.append(depth)
                values.append(value * 0.3**k)
                if k == 0:
                    spine = len(tokens) - 1
        return self._declared(tokens, parents, sources, values)

    def _declared(self, tokens: list[int], parents: list[int], sources: list[int], values: list[float]) -> TokenTree:
        d = self.drafts
        if d.kind == "drawn":
            levels = max(sources) + 1
            draws = (Draw.WITHOUT_REPLACEMENT,) * levels
            return TokenTree(
                tuple(tokens),
                tuple(parents),
                tuple(sources),
                torch.zeros(levels, 2),
                draws,
                tuple(values) if d.believed is not None else (),
            )
        return TokenTree(tuple(tokens), tuple(parents), estimates=tuple(values) if d.believed is not None else ())

    def _rate(self, row: Row, place: int) -> float:
        rate = self.drafts.rate
        share = (place - row.num_prompt) / (row.max_tokens - row.num_prompt)
        for since, value in self.drafts.rates:
            if share >= since:
                rate = value
        return rate

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        if self.drafts.observe_s and self.drafted[-1]:
            self.world.spend(self.drafts.observe_s * self.world.machine(len(rows), 1, 0.0))

    def end(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._texts.pop(row, None)
            self._read.pop(row, None)


@dataclass(frozen=True)
class Result:
    """What a run took."""

    work: float  # seconds that count
    tokens: int
    steps: int
    columns: tuple[int, ...]  # of each pass
    drafted: tuple[int, ...]  # nodes proposed in each step

    @property
    def num_drafts(self) -> int:
        return sum(n > 0 for n in self.drafted)


@dataclass(frozen=True)
class Scenario:
    """A workload on a machine. ``lengths``: (prompt, new tokens) of each row; ``max_rows`` of them run at a time."""

    drafts: Drafts
    machine: PassSeconds = CPU
    lengths: tuple[tuple[int, int], ...] = ((100, 500),)
    max_rows: int | None = None
    disturbed: dict[str, object] = field(default_factory=dict)  # arguments of World
    seed: int = 0

    def run(self, budget: Budget, drafter: SimulatedDrafter | None = None) -> Result:
        world = World(self.machine, seed=self.seed, **self.disturbed)  # type: ignore[arg-type]
        target, own = SimulatedTarget(world), SimulatedDrafter(world, self.drafts, self.seed)
        rows = [Row(i, list(range(p)), p + n) for i, (p, n) in enumerate(self.lengths)]
        decoder = Decoder(
            target, own, MatchVerifier(), _Policy(world), PhiloxRng(0), lambda row: False, budget, lambda: world.now
        )
        for _ in decoder.run(rows, self.max_rows):
            pass
        tokens = sum(row.num_emitted for row in rows)
        for row in rows:
            assert row.tokens[row.num_prompt :] == [i % _VOCAB for i in range(row.num_prompt, len(row.tokens))]
        return Result(world.work, tokens, world.num_passes, tuple(target.max_columns), tuple(own.drafted))

    def plain(self) -> float:
        return self.quiet.run(FixedBudget(0)).work

    @property
    def quiet(self) -> Scenario:
        """Without what only the clock sees: the score is the same."""
        drift = {key: value for key, value in self.disturbed.items() if key == "drift"}
        return replace(self, disturbed=drift)

    def fixed(self, sizes: Sequence[int] = SIZES) -> dict[int, float]:
        return {size: self.quiet.run(FixedBudget(size)).work for size in sizes}

    def adaptive(self, costs: PassCosts | None = None) -> Result:
        return self.run(AdaptiveBudget(16, costs or PassCosts()))


def drifting(share: float, last: float) -> float:
    """A factor of all costs that goes from 1 to ``last`` as the text grows."""
    return 1 + (last - 1) * share


def mixture(seed: int, max_rows: int = 4) -> Scenario:
    """Some workload on some machine, as ``seed`` says."""
    random = np.random.default_rng(seed)

    def pick(*values: float) -> float:
        return float(random.choice(values))

    num_rows, context = round(2 ** random.uniform(0, np.log2(max_rows))), round(100 * 80 ** random.random())
    kind = str(random.choice(["certain", "certain", "drawn", "silent"]))
    level_s = pick(0, 0, 0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    drafts = Drafts(
        rate=pick(0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 1.0),
        believed=None if kind == "silent" else pick(0.5, 0.6, 0.8, 0.9, 0.99, 0.008),
        hit_share=pick(1, 1, 0.7, 0.4),
        kind="drawn" if kind == "drawn" else "certain",
        width=int(pick(1, 1, 2)),
        length=int(pick(16, 16, 8)),
        level_s=level_s,
        base_s=pick(0.002, 0.03),
        prompt_s=0.01 if level_s else 0.0,
        rates=((0.5, pick(0, 0.9)),) if random.random() < 0.2 else (),
    )
    machine = MACHINES[int(random.integers(len(MACHINES)))]
    disturbed: dict[str, object] = {"noise": pick(0, 0.05, 0.2), "is_async": random.random() < 0.3}
    if random.random() < 0.5:
        disturbed["spikes"] = {int(random.integers(1, 60)): pick(1, 5, 20, 50) for _ in range(random.integers(1, 4))}
    if random.random() < 0.4:
        disturbed["slow"] = ((int(random.integers(100)), int(random.integers(1, 51)), pick(1.5, 3)),)
    if random.random() < 0.3:
        disturbed["drift"] = partial(drifting, last=pick(0.4, 2.5))
    if random.random() < 0.2:
        disturbed["first_s"] = pick(3, 20)
    lengths = ((context, 500),) * num_rows
    if random.random() < 0.4 and num_rows > 1:
        sizes = random.uniform(0.5, 1.2, num_rows + num_rows // 2)
        lengths = tuple((round(context * size) + 1, int(random.integers(150, 500))) for size in sizes)
    return Scenario(drafts, machine, lengths, num_rows, disturbed, seed)
