"""What recorded answers would have taken with smaller trees: seconds of a step, and rates of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from specdec.tune.setting import Answer, Pass

_LEAST = 0.05  # of a pass: whatever was timed, a step takes so long


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a step of one drafter at other sizes than it was recorded with.

    What is not the pass itself (drafting, the verdict, the loop, and that the machine was slower than when passes were
    timed) is what recorded steps took beyond their passes.
    """

    curve: Sequence[float]
    rest: float
    shares: Mapping[int, float]  # rows still there -> their step as a share of one of all rows

    @classmethod
    def fitted(cls, steps: Sequence[Pass], curve: Sequence[float], num_rows: int) -> StepSeconds:
        full = [step for step in steps if len(step.drafts) == num_rows] or steps
        rest = median([step.seconds - curve[step.num_columns - 1] for step in full] or [0.0])
        whole = cls(curve, rest, {})
        by_rows: dict[int, list[float]] = {}
        for step in steps:
            ratio = step.seconds / whole.of(num_rows, step.num_columns)
            by_rows.setdefault(len(step.drafts), []).append(ratio)
        return cls(curve, rest, {rows: median(ratios) for rows, ratios in by_rows.items() if rows != num_rows})

    def of(self, num_rows: int, num_columns: int) -> float:
        pass_s = self.curve[num_columns - 1]
        return self.shares.get(num_rows, 1.0) * max(pass_s + self.rest, _LEAST * pass_s)


@dataclass(frozen=True, slots=True)
class Replayed:
    """One answer as it would have been: tokens of its first pass; tokens and seconds of the sample of other steps."""

    first_tokens: float
    tokens: float
    seconds: float

    def rates(self, recorded: Answer) -> tuple[float, float]:
        """Tokens a second of the whole answer, as long as the recorded one, and of decoding."""
        first_s = recorded.passes[0].seconds
        if not self.tokens:
            return self.first_tokens / max(first_s, 1e-9), 1.0
        total = sum(one_pass.num_tokens for one_pass in recorded.passes)
        rate = self.tokens / max(self.seconds, 1e-9)
        return total / (first_s + max(total - self.first_tokens, 0.0) / rate), rate
