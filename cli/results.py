"""What a bench is asked for and what it measured, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.cli import options
from specdec.cli.matching import Judge
from specdec.cli.measure import Batch, Method, Output
from specdec.cli.synthetic import parse_acceptance
from specdec.drafters import auto_drafter, parse_drafter
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.hub.load import resolve_device, resolve_dtype
from specdec.records.prompts import BUILTIN, Prompt
from specdec.rng import PhiloxRng
from specdec.sampling import SamplingParams
from specdec.settings import DEFAULTS
from specdec.verifiers import make_verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Raises:
        ValueError: a number outside its range, or a name that nothing has.
    """

    target: str = DEFAULT_MODEL
    drafters: tuple[str, ...] = ()  # none named: the default one, or "model" where a draft model is given
    drafter_models: tuple[str, ...] = ()
    verifier: str = str(DEFAULTS.verifier)
    prompts: str = BUILTIN
    limit: int | None = None
    max_new_tokens: int = options.DEFAULT_MAX_NEW_TOKENS
    batch_size: int = 1
    temperature: float = 0.0
    seed: int = 0
    max_nodes: int = DEFAULTS.max_nodes
    adaptive: bool = True
    accelerate: bool = True
    cuda_graphs: bool = False
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    trace: Path | None = None
    trace_probs: bool = False
    config: Path | None = None  # tuned settings, whose costs the budgets start from
    synthetic_acceptance: str | None = None
    grammar: Path | None = None  # a JSON schema, or rules in Lark's notation, for every answer

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("max_nodes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        SamplingParams(self.temperature)
        PhiloxRng(self.seed)
        make_verifier(self.verifier)
        resolve_dtype(self.dtype, resolve_device(self.device))
        for text in self.drafters:
            parse_drafter(text)
        if self.synthetic_acceptance is not None:
            if self.grammar is not None:
                raise ValueError("a synthetic acceptance has no text that a grammar could be about: choose one of them")
            parse_acceptance(self.synthetic_acceptance)

    @property
    def drafter_specs(self) -> list[str]:
        """The drafters to measure, each once; plain decoding is always measured and is no drafter."""
        default = auto_drafter(bool(self.drafter_models))
        default = default if self.grammar is None else f"grammar:base={default}"
        return [spec for spec in dict.fromkeys(self.drafters or (default,)) if parse_drafter(spec)[0] != "none"]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its number in the file, which names its noise."""

    number: int
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a group: the same batch through every method."""

    questions: tuple[Question, ...]  # (B,)
    batch: Batch
    outputs: dict[Method, Output]


@dataclass(slots=True)
class Group:
    """Questions that are generated together, with all their turns: one measurement of each method."""

    questions: tuple[Question, ...]
    turns: list[Turn] = field(default_factory=list)

    def seconds(self, method: Method) -> float:
        return sum(turn.outputs[method].total_s for turn in self.turns)


@dataclass(slots=True)
class Results:
    """Everything that was measured."""

    config: BenchConfig
    methods: list[Method]
    skipped: list[dict[str, str]]  # method and reason
    provenance: dict[str, Any]
    judge: Judge
    groups: list[Group] = field(default_factory=list)
    is_partial: bool = False
