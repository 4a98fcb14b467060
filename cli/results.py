"""What a bench measured, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdec.cli.bench_config import BenchConfig
from specdec.cli.matching import Judge
from specdec.cli.measure import Batch, Method, Output
from specdec.records.prompts import Prompt


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
