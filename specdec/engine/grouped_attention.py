"""Attention on a CPU without repeated key-value heads.

transformers' own path copies keys and values once for each query head of a group wherever there is a mask, and
PyTorch's kernel is slow for one query in 16 bits. Here the heads of a group share their keys: as rows of one query
block where there are few queries, through the kernel's own grouping where there are many. A query that would be the
only row of its block stands there twice. Letters: B rows, h heads, G key-value heads, T queries, W slots, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FEW = 32  # queries up to which groups are faster as rows of one block


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None
) -> Tensor:
    """(B, h, T, D) from ``query`` (B, h, T, D), ``key`` and ``value`` (B, G, W, D), ``mask`` (B, 1, T, W) or None.

    Without a mask every query sees every slot.
    """
    batch, heads, num_queries, size = query.shape
    groups = heads // key.shape[1]
    is_block = groups > 1 and 1 < num_queries <= _FEW
    if query.is_cuda or not (is_block or is_slow(query)):
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    rows = query.reshape(batch, key.shape[1], groups * num_queries, size)
    if rows.shape[2] == 1:
        rows = rows.expand(-1, -1, 2, -1)
    mask = None if mask is None else _repeated(mask, rows.shape[2] // num_queries, query.dtype)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)
    return out[:, :, : groups * num_queries].reshape(batch, heads, num_queries, value.shape[-1])


def is_slow(query: Tensor) -> bool:
    """Whether PyTorch's kernel takes longer than for two such queries: it does for one in 16 bits."""
    return query.shape[2] == 1 and query.dtype in (torch.float16, torch.bfloat16)


def _repeated(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, groups T, W) additive; kept with ``mask``, which all layers of a pass share, until it is written to."""
    known: Tensor | None
    version = None if mask.is_inference() else mask._version
    known, seen = getattr(mask, "specdec_repeated", (None, None))
    if known is None or seen != version or known.shape[2] != groups * mask.shape[2] or known.dtype != dtype:
        if mask.dtype == torch.bool:
            known = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf).repeat(1, 1, groups, 1)
        else:
            known = mask.to(dtype).repeat(1, 1, groups, 1)
        mask.specdec_repeated = known, version  # type: ignore[attr-defined]
    return known
