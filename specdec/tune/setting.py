"""What is tuned: a target with its rule and sampling, how it decodes prompts, and what its passes cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from specdec.budget.adaptive import Budget
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import Drafter, Row, Verifier
from specdec.runtime import Runtime
from specdec.sampling import SamplingParams
from specdec.settings import Settings
from specdec.tree import TokenTree

COLUMNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class Draft:
    """What was verified for one row in one step, and the nodes of it that were emitted, the root included."""

    tree: TokenTree
    accepted: frozenset[int]  # as many as the tokens that the row emitted
    row: int = 0  # the row's key


@dataclass(slots=True)
class Pass:
    """One step of all rows."""

    drafts: list[Draft] = field(default_factory=list)
    seconds: float = 0.0  # all of it: drafting, the pass, the verdict, and what the loop does around them
    draft_s: float = 0.0  # of these: proposing and observing

    @property
    def num_tokens(self) -> int:
        return sum(len(draft.accepted) for draft in self.drafts)

    @property
    def num_columns(self) -> int:
        return max(len(draft.tree) for draft in self.drafts)


@dataclass(frozen=True, slots=True)
class Answer:
    """One batch of prompts from beginning to end. The first pass holds the prompts; the others are decoding."""

    prompt_lens: Sequence[int]
    passes: Sequence[Pass]

    @property
    def whole_rate(self) -> float:
        """Tokens a second, with the pass that holds the prompts."""
        return _rate(self.passes)

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the prompts' pass; None: nothing came after it."""
        return _rate(self.passes[1:]) if len(self.passes) > 1 else None


def _rate(passes: Sequence[Pass]) -> float:
    return sum(one_pass.num_tokens for one_pass in passes) / max(sum(one_pass.seconds for one_pass in passes), 1e-9)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a decoder is made of, besides drafter and budget."""

    runtime: Runtime
    verifier: Verifier
    params: SamplingParams
    eos_ids: frozenset[int]
    max_new_tokens: int
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter

    @property
    def engine(self) -> CausalLM:
        return self.runtime.target

    def drafter(self, spec: str) -> Drafter:
        return self.runtime.drafter(spec, self.verifier)

    def decoder(self, drafter: Drafter, budget: Budget) -> Decoder:
        settings = Settings(drafter=drafter, verifier=self.verifier, seed=self.seed)
        transform = WarperTransform(self.params)
        return self.runtime.decoder(settings, transform, self._is_at_end, budget=budget, clock=self.clock)

    def rows(self, prompts: Sequence[Tokens]) -> list[Row]:
        return [Row(i, list(ids), len(ids) + self.max_new_tokens) for i, ids in enumerate(prompts)]

    def answer(self, decoder: Decoder, prompts: Sequence[Tokens]) -> Answer:
        """Decode ``prompts`` as one batch; the passes' seconds add up to the wall time."""
        passes: list[Pass] = []
        before = self.clock()
        for emission in decoder.run(self.rows(prompts)):
            step = emission.step
            if step.index == len(passes):  # rows begin together: those of a pass have as many steps
                now = self.clock()
                passes.append(Pass(seconds=now - before))
                before = now
            passes[-1].drafts.append(Draft(emission.tree, frozenset(step.nodes), step.row))
            passes[-1].draft_s += step.draft_s
            del emission  # it holds what the pass computed
        passes[-1].seconds += self.clock() - before
        return Answer([len(ids) for ids in prompts], passes)

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
    return {size: median(samples[1:]) for size, samples in times.items()}


def _random_tree(root: int, size: int, engine: CausalLM, rng: np.random.Generator) -> TokenTree:
    parents = [-1, *(node - 1 if engine.chain_only else int(rng.integers(node)) for node in range(1, size))]
    tokens = rng.permutation(min(engine.vocab_size, 1000))[: size - 1].tolist()
    return TokenTree((root, *(int(token) for token in tokens)), tuple(parents))
