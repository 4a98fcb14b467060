"""Attention on a CPU without repeated key-value heads, registered with transformers under the name "specdec".

transformers' own path copies keys and values once for each query head of a group wherever there is a mask, and
PyTorch's kernel is slow for one query in 16 bits. Here the heads of a group share their keys: as rows of one query
block where there are few queries, through the kernel's own grouping where there are many. Letters: B rows, h heads,
G key-value heads, T queries, W slots, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "specdec"
_FEW = 8  # queries up to which 16-bit groups are faster as rows of one block (docs/log.md)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, T, h, D) from ``query`` (B, h, T, D), ``key`` and ``value`` (B, G, W, D), ``attention_mask`` (B, 1, T, W).

    What it does not cover goes to transformers' own function.
    """
    groups, num_queries = query.shape[1] // key.shape[1], query.shape[2]
    shared_mask = attention_mask is None or (attention_mask.dim() == 4 and attention_mask.shape[1] == 1)
    sees_all = attention_mask is not None or num_queries == 1
    if groups == 1 or not sees_all or not shared_mask or dropout or query.is_cuda or "position_bias" in kwargs:
        arguments = (dropout, scaling, is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, *arguments, **kwargs)  # type: ignore[no-any-return]
    if num_queries <= _FEW and query.dtype != torch.float32:
        batch, heads, _, size = query.shape
        rows = query.reshape(batch, key.shape[1], groups * num_queries, size)
        mask = None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1)
        out = nn.functional.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)
        out = out.reshape(batch, heads, num_queries, value.shape[-1])
    else:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
