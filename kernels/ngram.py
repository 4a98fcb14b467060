"""``lookup_ngram``: prompt lookup (Saxena, 2023) on the device, for loops that never read back.

Letters: B rows, S capacity of the history, k tokens proposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.dispatch import choose
from specdec.kernels.launch import int32, require

FILE = "ngram.cu"
EXPRESSIONS = ("lookup_ngram",)


@dataclass(frozen=True, slots=True)
class Lookup:
    """A chain for each row; places behind ``counts`` hold -1."""

    tokens: Tensor  # (B, k) int64
    counts: Tensor  # (B,) int32
    orders: Tensor  # (B,) int32 length of the suffix that occurred before, 0: none


def lookup_ngram(history: Tensor, lengths: Tensor, k: int, min_order: int = 1, max_order: int = 4) -> Lookup:
    """What followed the latest earlier occurrence of the longest suffix of ``min_order`` to ``max_order`` tokens.

    Args:
        history: (B, S) int64.
        lengths: (B,) int32, how many tokens of each row are in use.

    Raises:
        ValueError: shapes or dtypes that do not fit, k below 1, or orders out of order.
    """
    require("history", history, torch.int64, (None, None), history)
    require("lengths", lengths, torch.int32, (len(history),), history)
    if k < 1 or not 1 <= min_order <= max_order:
        raise ValueError(
            f"k and min_order must be at least 1 and max_order at least min_order, got {k}, {min_order}, {max_order}"
        )
    backend = choose("lookup_ngram", history.device)
    if backend is None:
        return lookup_ngram_torch(history, lengths, k, min_order, max_order)
    (kernel,) = backend.load(FILE, EXPRESSIONS)
    rows, size = history.shape
    found = Lookup(
        backend.empty((rows, k), torch.int64, history.device),
        backend.empty((rows,), torch.int32, history.device),
        backend.empty((rows,), torch.int32, history.device),
    )
    sizes = map(int32, (size, min_order, max_order, k))
    kernel((rows,), 512, (history, lengths, found.tokens, found.counts, found.orders, *sizes))
    return found


def lookup_ngram_torch(history: Tensor, lengths: Tensor, k: int, min_order: int, max_order: int) -> Lookup:
    """The twin of :func:`lookup_ngram`: all rows and places at once, without host reads."""
    rows, size = history.shape
    ends = torch.arange(1, size + 1, device=history.device).expand(rows, size)  # a suffix ends before this place
    length = lengths[:, None].long()
    orders = torch.zeros_like(ends)
    is_on = ends < length
    for back in range(1, max_order + 1):
        place = ends - back
        last = history.gather(1, (length - back).clamp(min=0))
        is_on = is_on & (place >= 0) & (history.gather(1, place.clamp(min=0)) == last)
        orders = orders + is_on
    score = torch.where(orders >= min_order, orders * 2**32 + ends, 0).amax(1, keepdim=True)
    start, order = score & 0xFFFFFFFF, score >> 32
    count = torch.where(order > 0, (length - start).clamp(max=k), 0)
    places = torch.arange(k, device=history.device)
    tokens = history.gather(1, (start + places).clamp(max=size - 1))
    return Lookup(torch.where(places < count, tokens, -1), count[:, 0].int(), order[:, 0].int())
