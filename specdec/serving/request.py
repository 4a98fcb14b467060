"""What a request asks for, and what it gets back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from specdec.checks import shown, whole_number
from specdec.grammar.inputs import Grammar
from specdec.interfaces import Step
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY, SamplingParams
from specdec.stats import Stats

MAX_LOGPROBS = 20


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence token, a stop string, or a complete grammar
    LENGTH = "length"  # max_new_tokens
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSettings:
    """How to answer one request.

    Args:
        max_new_tokens: at most so many tokens.
        temperature: 0 is greedy.
        top_k, top_p, min_p: None switches each off.
        seed: of the sampling noise, in [0, 2**64); None draws one. The same seed gives the same text in any batch.
        stop: strings before which the text ends. The tokens are kept up to the one that completed the string.
        stop_token_ids: None takes the end-of-sequence tokens of the model; () goes on to ``max_new_tokens``.
        logits_processors: as for ``generate()``, asked about this row alone: token ids (1, L) and scores (1, V). They
            must keep no state.
        grammar: what the text must match, as for ``generate()``; the engine needs its tokenizer for it.
        draft: whether to speculate.
        priority: requests with a higher one come first; nobody waits for ever.
        logprobs: return the log-probability of each token under the model's own distribution, and of so many of the
            most probable ones; None: none.

    Raises:
        ValueError: a value outside its range; the message begins with the name of the field.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[Any] = ()
    grammar: Grammar | None = None
    draft: bool = True
    priority: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if whole_number("max_new_tokens", self.max_new_tokens) < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature!r}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a list of strings that are not empty, got {self.stop!r}")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar must be a specdec.Grammar, got {shown(self.grammar)}")
        if self.logprobs is not None and not 0 <= whole_number("logprobs", self.logprobs) <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must be from 0 to {MAX_LOGPROBS}, got {self.logprobs}")
        if self.seed is not None:
            PhiloxRng(self.seed)
        _ = self.params

    @property
    def params(self) -> SamplingParams:
        """The distribution to draw from."""
        if self.temperature == 0:
            return GREEDY
        top_p = 1.0 if self.top_p is None else self.top_p
        return SamplingParams(self.temperature, self.top_k or 0, top_p, self.min_p or 0.0)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one emitted token, under the model's own distribution: before temperature, processors and grammars."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), the most probable first


@dataclass(frozen=True, slots=True)
class Delta:
    """What one forward pass emitted for one request."""

    tokens: tuple[int, ...]
    text: str  # whole characters, up to a stop string
    step: Step | None  # None: the request ended without one, cancelled or by an error
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token, if asked for
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Completion:
    """What became of a request."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    seed: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stats: Stats = field(default_factory=Stats)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached: int = 0  # prompt tokens that a shared prefix spared
    num_preemptions: int = 0
    queued_s: float = 0.0  # from submit until it first ran
    first_token_s: float = 0.0  # from submit
    total_s: float = 0.0
