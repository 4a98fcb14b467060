"""Statistics for what enumeration cannot see: a G-test, and PhiloxRng in plain integers."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from toy import Tokens

from specdec.rng import Stream


def g_test(observed: Iterable[Hashable], expected: dict[Hashable, float]) -> float:
    """The probability of a worse fit by chance (G-test); cells with fewer than five expected are pooled.

    An outcome that cannot happen makes it 0.
    """
    counts = defaultdict[Hashable, int](int)
    for outcome in observed:
        counts[outcome] += 1
    if any(expected.get(outcome, 0.0) <= 0 for outcome in counts):
        return 0.0
    total = sum(counts.values())
    pooled_count, pooled_mass, cells = 0, 0.0, list[tuple[int, float]]()
    for outcome, mass in sorted(expected.items(), key=lambda item: item[1]):
        if mass * total < 5 or 0 < pooled_mass * total < 5:
            pooled_count, pooled_mass = pooled_count + counts[outcome], pooled_mass + mass
        else:
            cells.append((counts[outcome], mass))
    if pooled_mass > 0:
        cells.append((pooled_count, pooled_mass))
    statistic = 2 * math.fsum(n * math.log(n / (mass * total)) for n, mass in cells if n)
    degrees = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(max(statistic, 0.0) / 2, dtype=torch.float64)))


def scalar_philox(counter: Sequence[int], key: int) -> Tokens:
    """Philox4x32-10 in plain integers, written from the paper: a second opinion on specdec.rng.philox."""
    a, b, c, d = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (p1 >> 32) ^ b ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ d ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


@dataclass(frozen=True, slots=True)
class TwinNoise:
    """PhiloxRng number for number, for vocabularies of up to four tokens, at a tenth of the cost: for many runs."""

    seed: int

    def at(self, row: int, position: int) -> TwinRowNoise:
        return TwinRowNoise(self.seed, row, position)


@dataclass(frozen=True, slots=True)
class TwinRowNoise:
    """One row's share of :class:`TwinNoise`."""

    seed: int
    row: int
    position: int

    def words(self, depth: int, stream: Stream, index: int) -> Tokens:
        if stream is Stream.TARGET:
            counter = (0, self.position + depth, 0, self.row)
        else:
            counter = (0, self.position, stream << 28 | depth << 16 | index, self.row)
        return scalar_philox(counter, self.seed)

    def uniform(self, depth: int, stream: Stream, index: int) -> list[float]:
        return [(word + 0.5) * 2.0**-32 for word in self.words(depth, stream, index)]

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        if stream is not Stream.TARGET:
            high, low, _, _ = self.words(depth, stream, index)
            reached = list(itertools.accumulate(probs.tolist()))
            point = (high * 2.0**32 + low + 0.5) * 2.0**-64 * reached[-1]
            return next(token for token, value in enumerate(reached) if value > point)
        uniform = self.uniform(depth, stream, index)
        scores = [
            (math.log(prob) - math.log(-math.log(u)), -token)
            for token, (prob, u) in enumerate(zip(probs.tolist(), uniform, strict=False))
            if prob > 0
        ]
        return -max(scores)[1]

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        return self.uniform(depth, Stream.COIN, index)[0] < prob
