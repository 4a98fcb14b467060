"""Budgets without a model: steps whose acceptance and costs are known, and a clock that only adds them up.

Seconds are passes of plain decoding; what noise adds to a time is told to the budget, and not added up. A drafter
proposes one chain a step; what it believes of itself and what is true may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.budget.adaptive import Budget
from specdec.interfaces import Limit, Row, Verdict
from specdec.tree import TokenTree

Curve = Callable[[int], float]  # seconds of a pass of n columns


def interpolated(points: Sequence[tuple[int, float]]) -> Curve:
    sizes, seconds = zip(*points, strict=True)
    return lambda n: float(np.interp(n, sizes, seconds))


# As measured for SmolLM2 on a CPU: float32 by one thread, bfloat16 by two.
FLOAT32 = interpolated([(1, 1.0), (2, 1.8), (5, 1.75), (9, 1.9), (17, 2.4), (33, 3.4)])
BFLOAT16 = interpolated([(1, 1.0), (2, 1.01), (9, 1.1), (17, 1.3), (25, 1.4), (33, 1.6)])


@dataclass
class Drafts:
    """A drafter: in a share ``hit_share`` of steps each token is right with ``rate`` (given that those before it
    are), in the others never; it says ``believed`` of each (None: nothing at all).
    """

    rate: float
    believed: float | None = 0.8
    hit_share: float = 1.0
    length: int = 16
    base_s: float = 0.002
    level_s: float = 0.0  # drafting time for each level, as with a model
    believed_bad: float = 0.05  # of what it says in the other steps

    def seconds(self, depth: int) -> float:
        return self.base_s + self.level_s * depth if depth else 0.0


@dataclass
class Simulation:
    """Steps of one row after another, ``num_tokens`` each, through a budget."""

    budget: Budget
    drafts: Drafts
    curve: Curve
    rng: float = 0.0  # of the times that the budget sees: standard deviation of their logarithm
    num_tokens: int = 256  # a row's
    seed: int = 0
    seconds: float = 0.0
    tokens: int = 0
    sizes: list[int] = field(default_factory=list)  # nodes verified in each step
    drafted: list[int] = field(default_factory=list)  # nodes proposed in each step

    def run(self, num_steps: int) -> Simulation:
        self.random = np.random.default_rng(self.seed)
        row = Row(0, [1], 1 + self.num_tokens)
        for _ in range(num_steps):
            if row.num_left <= 0:
                row = Row(0, [1], 1 + self.num_tokens)
            self._step(row)
        return self

    def _step(self, row: Row) -> None:
        (limit,) = self.budget.limits([row], False)
        is_good = self.random.random() < self.drafts.hit_share
        tree = self._propose(limit, is_good)
        draft_s = self.drafts.seconds(max(tree.depths()))
        (cut,) = self.budget.cut([row], [tree])
        score_s = self.curve(len(cut))
        right = int(self.random.geometric(1 - self.drafts.rate)) - 1 if is_good else 0
        accepted = min(right, len(cut) - 1)
        verdict = Verdict(tuple(range(accepted + 1)), (1,) * (accepted + 1))
        row.num_steps += 1
        row.tokens += verdict.tokens
        self.budget.learn([row], [cut], [verdict], self._noisy(draft_s), self._noisy(score_s))
        self.seconds += draft_s + score_s
        self.tokens += accepted + 1
        self.sizes.append(len(cut) - 1)
        self.drafted.append(len(tree) - 1)

    def _propose(self, limit: Limit, is_good: bool) -> TokenTree:
        length = max(0, min(self.drafts.length, limit.num_levels, limit.nodes))
        tokens, parents = (1,) * (length + 1), tuple(range(-1, length))
        if self.drafts.believed is None or not length:
            return TokenTree(tokens, parents)
        believed = self.drafts.believed if is_good else self.drafts.believed_bad
        return TokenTree(tokens, parents, estimates=tuple(believed**depth for depth in range(length + 1)))

    def _noisy(self, seconds: float) -> float:
        return seconds * math.exp(self.rng * self.random.standard_normal() - self.rng**2 / 2)

    @property
    def speedup(self) -> float:
        """Tokens a second against plain decoding: a second is one of its passes."""
        return self.tokens / self.seconds
