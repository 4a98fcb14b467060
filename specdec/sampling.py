"""Sampling parameters and the usual warpers, fused: temperature, top-k, top-p, min-p in the order of generate()."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The usual sampling parameters; the defaults change nothing. ``temperature`` 0 is greedy decoding.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a positive number, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


GREEDY = SamplingParams(temperature=0.0)


def sampling_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution (V,) that ``generate()`` samples from, for raw ``logits`` (V,): float32, or float64 if they are.

    Same order as transformers' warpers (temperature, top-k, top-p, min-p), and as many tokens stay, but what top-k
    drops is never sorted. Of equal logits at the border of top-p the lowest token ids stay, as in ``pick_rows``; there
    any may, because the sort is not stable. Temperature 0 puts all mass on the first largest logit.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if params.is_greedy:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    if params.temperature != 1.0:
        scores = scores / params.temperature
    support = None
    if 0 < params.top_k < scores.shape[-1]:
        # Every token that ties with the k-th stays, as in TopKLogitsWarper; so does NaN, for the caller to see.
        support = (~(scores < scores.topk(params.top_k).values[-1])).nonzero().squeeze(-1)
        scores = scores[support]
    if params.top_p < 1.0:
        scores = _top_p(scores, params.top_p)
    probs = scores.softmax(-1)
    if params.min_p > 0.0:
        probs = torch.where(probs < params.min_p * probs.max(), 0.0, probs)
        probs = probs / probs.sum()
    if support is None:
        return probs
    full = torch.zeros(logits.shape, dtype=probs.dtype, device=probs.device)
    return full.scatter_(-1, support, probs)


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    """Nucleus filtering (Holtzman et al., 2019) of ``scores`` (k,), as in TopPLogitsWarper but for equal scores."""
    ascending = scores.sort().values
    num_dropped = int((ascending.softmax(-1).cumsum(-1)[:-1] <= 1 - top_p).sum())
    border = ascending[num_dropped]
    dropped = scores < border
    num_tied = num_dropped - int(dropped.sum())
    if num_tied > 0:
        dropped[(scores == border).nonzero().squeeze(-1)[-num_tied:]] = True
    return scores.masked_fill(dropped, float("-inf"))
