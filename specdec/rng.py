"""Randomness as an argument: noise tied to (seed, row, position) by a counter-based generator.

The generator is Philox4x32-10 (Salmon et al., SC 2011). Nothing here keeps state, so the same question always gets
the same answer: what a row samples does not depend on the drafter, the tree, the batch or the order of calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.checks import whole_number

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


class Stream(IntEnum):
    """What a random number is for; numbers of different streams are independent."""

    TARGET = 0  # the target's own choice at a position: a function of (seed, row, position) alone
    DRAFT = 1  # what a drafter draws
    COIN = 2  # accept or reject
    RESIDUAL = 3  # the token emitted after a rejection


class RowRng(Protocol):
    """The noise of one row during one step; ``depth`` 0 decides the token right after the root."""

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        """A token from ``probs`` (V,), which need not be normalised."""

    def gumbel(self, tokens: Tensor, depth: int) -> Tensor:
        """The Gumbel noise (k,) that stream TARGET's ``draw`` adds to token ids ``tokens`` (k,) at this depth."""

    def sample_without_replacement(self, probs: Tensor, count: int, depth: int, index: int = 0) -> list[int]:
        """At most ``count`` tokens drawn one after another without replacement, for drafting (stream DRAFT)."""

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        """True with probability ``prob``; never for 0, always from 1 on."""


class Rng(Protocol):
    """Where a run's randomness comes from."""

    def at(self, row: int, position: int) -> RowRng:
        """The noise of ``row`` for a step whose first undecided token has the absolute ``position``."""


@dataclass(frozen=True, slots=True)
class PartNoise:
    """The noise of one of ``num_parts`` drafters that draft for the same step: no two of them draw by the same number.

    A part that has parts of its own divides what it was given, to any depth. The target's own choice, stream TARGET, is
    every part's, because that is what a drafter shares with the verifier.
    """

    rng: Rng
    part: int
    num_parts: int

    def at(self, row: int, position: int) -> PartRowNoise:
        return PartRowNoise(self.rng.at(row, position), self.part, self.num_parts)


@dataclass(frozen=True, slots=True)
class PartRowNoise:
    """See :class:`PartNoise`."""

    rng: RowRng
    part: int
    num_parts: int

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        return self.rng.draw(probs, depth, stream, index if stream is Stream.TARGET else self._own(index))

    def gumbel(self, tokens: Tensor, depth: int) -> Tensor:
        return self.rng.gumbel(tokens, depth)

    def sample_without_replacement(self, probs: Tensor, count: int, depth: int, index: int = 0) -> list[int]:
        return self.rng.sample_without_replacement(probs, count, depth, self._own(index))

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        return self.rng.bernoulli(prob, depth, self._own(index))

    def _own(self, index: int) -> int:
        """Every ``num_parts``-th index is this part's."""
        return index * self.num_parts + self.part


@dataclass(frozen=True, slots=True)
class PhiloxRng:
    """Noise tied to (seed, row, absolute position).

    Stream TARGET is keyed by the position of the decided token only, which makes sample-and-match token-identical to
    plain sampling. The others are keyed by the step's first position too: a position can be drafted again in a later
    step, and reusing its noise then would correlate with what earlier verification saw (rules that look ahead, such
    as block verification, would be biased by that).
    """

    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole_number("seed", self.seed))
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")

    def at(self, row: int, position: int) -> PhiloxRowRng:
        return PhiloxRowRng(self.seed, row, position)


@dataclass(frozen=True, slots=True)
class PhiloxRowRng:
    """See :class:`PhiloxRng`."""

    seed: int
    row: int
    position: int

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        """A token from ``probs`` (V,).

        For the target's own choice it is argmax(log probs + Gumbel noise): nearby distributions then mostly agree,
        which is what couples a drafter with sample-and-match. Elsewhere one uniform number is inverted, which is
        cheaper.
        """
        if stream is not Stream.TARGET:
            reached = probs.double().cumsum(-1)
            words = self._words(torch.arange(2, device=probs.device), depth, stream, index).double()
            uniform = (words[0] * 2.0**32 + words[1] + 0.5) * 2.0**-64
            token = int(torch.searchsorted(reached, uniform * reached[-1], right=True))
            # Rounding may lead past the end, or onto the last token that has any mass.
            return token if token < len(probs) and probs[token] > 0 else int(probs.nonzero()[-1])
        support = probs.nonzero().squeeze(-1)
        if support.numel() == 1:
            return int(support)
        if support.numel() == probs.numel():
            return int((probs.double().log() + self.gumbel(support, depth)).argmax())
        return int(support[self._scores(probs, support, depth, stream, index).argmax()])

    def sample_without_replacement(self, probs: Tensor, count: int, depth: int, index: int = 0) -> list[int]:
        """The ``count`` largest of log probs + Gumbel noise, in order (exponential race; Kool et al., 2019)."""
        support = probs.nonzero().squeeze(-1)
        best = self._scores(probs, support, depth, Stream.DRAFT, index).topk(min(count, support.numel())).indices
        return support[best].tolist()

    def _scores(self, probs: Tensor, support: Tensor, depth: int, stream: Stream, index: int) -> Tensor:
        return probs[support].double().log() + self.gumbel(support, depth, stream, index)

    def gumbel(self, tokens: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> Tensor:
        """Standard Gumbel noise (k,) in float64 for token ids ``tokens`` (k,)."""
        uniform = (self._words(tokens, depth, stream, index).double() + 0.5) * 2.0**-32
        return -torch.log(-torch.log(uniform))

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        word = self._words(torch.zeros(1, dtype=torch.long), depth, Stream.COIN, index)
        return (int(word) + 0.5) * 2.0**-32 < prob

    def _words(self, tokens: Tensor, depth: int, stream: Stream, index: int) -> Tensor:
        """Random 32-bit words (k,) as int64, one for each token id of ``tokens`` (k,)."""
        if not (0 <= depth < 2**12 and 0 <= index < 2**16):
            raise ValueError(f"depth must be below 4096 and index below 65536, got {depth} and {index}")
        # One position's number is the same in every step for TARGET; elsewhere the step (its first position) counts.
        target = stream is Stream.TARGET
        position = self.position + depth if target else self.position
        detail = int(stream) << 28 | (0 if target else depth << 16 | index)
        # One block makes four numbers: a dense support computes each block once.
        first, last = (int(tokens.min()) >> 2, int(tokens.max()) >> 2) if tokens.numel() else (0, 0)
        if last - first < tokens.numel():
            blocks = torch.arange(first, last + 1, device=tokens.device)
            words = philox(blocks, position & _LOW, detail, self.row & _LOW, self.seed).T.reshape(-1)
            start = int(tokens[0]) - 4 * first
            if _is_range(tokens):
                return words[start : start + tokens.numel()]
            return words[tokens - 4 * first]
        words = philox(tokens >> 2, position & _LOW, detail, self.row & _LOW, self.seed)
        return words.gather(0, (tokens & 3)[None]).squeeze(0)


def philox(counter: Tensor, c1: int, c2: int, c3: int, seed: int) -> Tensor:
    """Philox4x32-10: the words (4, k) in [0, 2**32) as int64 for counters (counter (k,), c1, c2, c3) and key ``seed``."""
    if counter.device.type == "cpu":
        words = _philox_numpy(counter.numpy().view(np.uint64) & np.uint64(_LOW), c1, c2, c3, seed)
        return torch.from_numpy(words.view(np.int64))
    return _philox_torch(counter, c1, c2, c3, seed)


def _philox_torch(counter: Tensor, c1: int, c2: int, c3: int, seed: int) -> Tensor:
    a, b, c, d = (
        counter & _LOW,
        torch.full_like(counter, c1),
        torch.full_like(counter, c2),
        torch.full_like(counter, c3),
    )
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        # int64 products wrap, which keeps all 64 bits right; the mask undoes the sign of the shift.
        p0, p1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (p1 >> 32) & _LOW ^ b ^ k0, p1 & _LOW, (p0 >> 32) & _LOW ^ d ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack((a, b, c, d))


def _philox_numpy(a: NDArray[np.uint64], c1: int, c2: int, c3: int, seed: int) -> NDArray[np.uint64]:
    """The same in numpy, which works in place and takes a third of the time on a CPU; ``a`` is overwritten."""
    b, c, d = (np.full_like(a, word) for word in (c1, c2, c3))
    p0, p1 = np.empty_like(a), np.empty_like(a)
    half, low = np.uint64(32), np.uint64(_LOW)
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        np.multiply(a, np.uint64(_MULTIPLIERS[0]), out=p0)
        np.multiply(c, np.uint64(_MULTIPLIERS[1]), out=p1)
        for product, mixed, key, out in ((p1, b, k0, a), (p0, d, k1, c)):
            np.right_shift(product, half, out=out)
            np.bitwise_xor(out, mixed, out=out)
            np.bitwise_xor(out, np.uint64(key), out=out)
        np.bitwise_and(p1, low, out=b)
        np.bitwise_and(p0, low, out=d)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((a, b, c, d))


def _is_range(tokens: Tensor) -> bool:
    """Whether ``tokens`` (k,) are neighbouring ids in rising order, as the whole vocabulary is."""
    return int(tokens[-1] - tokens[0]) == tokens.numel() - 1 and bool((tokens[1:] > tokens[:-1]).all())
