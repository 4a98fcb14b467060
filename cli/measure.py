"""The methods that a bench compares, each behind the same call: a batch of prompts in, tokens and seconds out.

All of them run on the same model object, from the same token ids to at most the same number of new tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.cli.details import Details, details
from specdec.cli.saved import neutral_config
from specdec.constraints import GrammarState
from specdec.decode import Decoder
from specdec.engine.causal_lm import CausalLM
from specdec.grammar.masks import GrammarProcessor
from specdec.grammar.row import RowGrammar
from specdec.interfaces import Row, Step

Clock = Callable[[], float]

HF_GENERATE, HF_LOOKUP, HF_ASSISTED, PLAIN = "hf-generate", "hf-prompt-lookup", "hf-assisted", "plain"
LOOKUP_TOKENS = 10  # what transformers' documentation uses


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that are generated together."""

    prompts: tuple[tuple[int, ...], ...]  # (B,) of token ids
    keys: tuple[int, ...]  # (B,) the rows' noise: the number of the question, whatever the batch
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Output:
    """What one method made of one batch."""

    tokens: tuple[tuple[int, ...], ...]  # (B,) of new ids, the end-of-text token included
    total_s: float
    first_s: float  # until the first tokens of every row were there: the prompt's pass
    num_first: int  # those tokens
    blocks: tuple[tuple[int, ...], ...]  # (B,) of tokens that each pass gave the row
    steps: tuple[Step, ...] = ()  # of our own loop
    details: tuple[Details, ...] = ()  # one for each step, if asked for
    model_s: float | None = None  # inside the forward passes of target and draft model

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


class Method(Protocol):
    """One thing to measure."""

    @property
    def name(self) -> str: ...
    @property
    def drafter(self) -> str | None: ...
    @property
    def verifier(self) -> str | None: ...
    @property
    def lossless(self) -> bool: ...
    def run(self, batch: Batch) -> Output: ...


def up_to_end(tokens: Sequence[int], eos_ids: frozenset[int]) -> tuple[int, ...]:
    """The one token counter: new ``tokens`` up to and including the first that ends a text."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tuple(tokens[:end])


@dataclass(frozen=True, slots=True, eq=False)
class HfGenerate:
    """transformers' own generate(): plain, with prompt lookup, or assisted by a draft model."""

    name: str
    model: Any
    eos_ids: frozenset[int]
    temperature: float
    seed: int
    draft_model: Any | None = None
    clock: Clock = time.perf_counter
    drafter: str | None = None
    verifier: str | None = None
    lossless: bool = True
    grammar: GrammarState | None = None  # of an empty text; every answer must match it

    def run(self, batch: Batch) -> Output:
        """With sampling, the noise is torch's, seeded for each batch; it is another noise than ours."""
        input_ids, mask = left_padded(batch.prompts, self.model.device)
        streamer = _Passes(self.clock)
        devices = [input_ids.device] if input_ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices), neutral_generation(self.model, self.eos_ids):
            torch.manual_seed((self.seed * 1_000_003 + batch.keys[0]) % 2**63)
            started = self.clock()
            ids = self.model.generate(input_ids, attention_mask=mask, streamer=streamer, **self._options(batch))
            if devices:
                torch.cuda.synchronize()
            ended = self.clock()
        rows = [up_to_end(row, self.eos_ids) for row in ids[:, input_ids.shape[1] :].tolist()]
        # Several rows are only ever generated token by token.
        blocks = [_cut(streamer.sizes, len(rows[0]))] if len(rows) == 1 else [(1,) * len(row) for row in rows]
        num_first = sum(block[0] for block in blocks)
        return Output(tuple(rows), ended - started, streamer.first - started, num_first, tuple(blocks))

    def _options(self, batch: Batch) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": batch.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        if self.grammar is not None:
            options["logits_processor"] = [GrammarProcessor([self.grammar], tuple(self.eos_ids))]
        if self.name == HF_LOOKUP:
            options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
        if self.draft_model is not None:
            options["assistant_model"] = self.draft_model
        return options


@dataclass(frozen=True, slots=True, eq=False)
class Speculative:
    """Our own loop with one drafter; plain decoding is the drafter that proposes nothing."""

    name: str
    drafter: str | None
    decoder: Decoder
    target: CausalLM
    eos_ids: frozenset[int]
    clock: Clock = time.perf_counter
    is_detailed: bool = False  # also look behind each step; the time for it is left out of the measurement
    grammar: GrammarState | None = None  # of an empty text; every answer must match it

    @property
    def verifier(self) -> str:
        return self.decoder.verifier.name

    @property
    def lossless(self) -> bool:
        return self.decoder.verifier.lossless

    def run(self, batch: Batch) -> Output:
        rows = [
            Row(key, list(ids), len(ids) + batch.max_new_tokens)
            for key, ids in zip(batch.keys, batch.prompts, strict=True)
        ]
        for row in rows:
            row.grammar = None if self.grammar is None else RowGrammar(self.grammar.fork(), row.num_prompt)
        steps: list[Step] = []
        seen: list[Details] = []
        looking_s = 0.0
        model_s = self._model_s()
        started = self.clock()
        first = started
        for emission in self.decoder.run(rows):
            if not steps:
                first = self.clock()
            steps.append(emission.step)
            if self.is_detailed:
                looked = self.clock()
                seen.append(details(emission))
                looking_s += self.clock() - looked
        ended = self.clock() - looking_s
        blocks = tuple(tuple(len(s.tokens) for s in steps if s.row == row.key) for row in rows)
        return Output(
            tokens=tuple(up_to_end(row.tokens[row.num_prompt :], self.eos_ids) for row in rows),
            total_s=ended - started,
            first_s=first - started,
            num_first=sum(block[0] for block in blocks),
            blocks=blocks,
            steps=tuple(steps),
            details=tuple(seen),
            model_s=self._model_s() - model_s,
        )

    def _model_s(self) -> float:
        """Seconds inside models so far: the target's and those that the drafter runs."""
        return self.target.model_s + self.decoder.drafter.model_s


def ends_with(eos_ids: frozenset[int]) -> Callable[[Row], bool]:
    """Whether a row's newest token is one of ``eos_ids``."""
    return lambda row: row.tokens[-1] in eos_ids


@contextmanager
def neutral_generation(model: Any, eos_ids: frozenset[int]) -> Iterator[None]:
    """Let generate() decode from the model's own distribution; the model's generation config is put back after."""
    own = model.generation_config
    model.generation_config = neutral_config(own, eos_ids)
    try:
        yield
    finally:
        model.generation_config = own


@dataclass(slots=True)
class _Passes:
    """A streamer that only looks at the clock: when the first tokens come and how many each pass brings."""

    clock: Clock
    first: float = 0.0
    sizes: list[int] = field(default_factory=list)
    _has_prompt: bool = False

    def put(self, value: Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        if not self.sizes:
            self.first = self.clock()
        self.sizes.append(value.numel())

    def end(self) -> None: ...


def _cut(sizes: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """Block sizes that add up to ``num_tokens``: what came behind the end does not count."""
    kept = []
    for size in sizes:
        if num_tokens <= 0:
            break
        kept.append(min(size, num_tokens))
        num_tokens -= size
    return tuple(kept)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, L)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
