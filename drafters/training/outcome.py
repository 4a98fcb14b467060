"""What training modules are given and what they say: batches, losses, ranks, and their sums. Letters: P places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RANKS = (1, 4, 8)  # reported: the target's best token is among so many best of the draft's
NUM_RANKS = 16

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a module says of one batch."""

    loss: Tensor  # ()
    ranks: tuple[Tensor, ...]  # of each place (head, or step ahead): the target's best token's rank, 0 for the best


class Batches:
    """Where batches come from; the same epoch always gives the same ones in the same order."""

    def __init__(self, num_batches: int, epoch: Callable[[int], Iterator[Batch]]) -> None:
        self.num_batches, self.epoch = num_batches, epoch

    def start_at(self, epoch: int, index: int) -> Iterator[Batch]:
        batches = self.epoch(epoch)
        for _ in range(index):
            next(batches, None)
        return batches


@dataclass(slots=True)
class Meter:
    """Sums since the last report."""

    loss: float = 0.0
    num_batches: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    histogram: Tensor | None = None  # (P, NUM_RANKS + 1) how often each rank was the target's best; last: none of them

    def add(self, outcome: Outcome, num_tokens: int) -> None:
        self.loss += float(outcome.loss.detach())
        self.num_batches += 1
        self.num_tokens += num_tokens
        counts = [rank.clamp(max=NUM_RANKS).bincount(minlength=NUM_RANKS + 1) for rank in outcome.ranks]
        histogram = torch.stack(counts).cpu()
        self.histogram = histogram if self.histogram is None else self.histogram + histogram

    def table(self) -> list[list[float]]:
        """(P, NUM_RANKS): how often the draft's r-th best token is the target's best."""
        assert self.histogram is not None
        shares = self.histogram / self.histogram.sum(-1, keepdim=True).clamp(min=1)
        return [[round(share, 5) for share in row] for row in shares[:, :NUM_RANKS].tolist()]

    def facts(self) -> dict[str, Any]:
        table = torch.tensor(self.table())
        rates = [table[:, :rank].sum(-1).tolist() for rank in RANKS]
        facts: dict[str, Any] = {"loss": round(self.loss / max(self.num_batches, 1), 4)}
        for rank, values in zip(RANKS, rates, strict=True):
            facts[f"top{rank}"] = [round(value, 4) for value in values]
        # Of a chain whose places were independent; the true one is measured with the real tree at the end.
        facts["chain_length"] = round(1 + sum(math.prod(rates[0][: i + 1]) for i in range(len(rates[0]))), 3)
        return facts
