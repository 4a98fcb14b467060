"""Attention on a CPU without repeated key-value heads, registered with transformers under the name "specdec".

transformers' own path copies keys and values once for each query head of a group wherever there is a mask, and
PyTorch's kernel is slow for one query in 16 bits. Here the heads of a group share their keys: as rows of one query
block where there are few queries, through the kernel's own grouping where there are many. A query that would be the
only row of its block stands there twice. Letters: B rows, h heads, G key-value heads, T queries, W slots, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.engine.masks import TreePass
from specdec.errors import UnsupportedModelError
from specdec.kernels.attention import KVView, lacking, tree_attention

NAME = "specdec"
_FEW = 32  # queries up to which groups are faster as rows of one block


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

    A mask that carries the bits of a tree goes to our kernel (``specdec.kernels.attention``) if there is one for these
    heads. What is not covered goes to transformers' own function: the mask says the same as its bits, and the kernel's
    twin would copy the whole cache in float32.
    """
    tree: TreePass | None = getattr(attention_mask, "tree_pass", None)
    if tree is not None and not dropout and scaling is not None and not lacking(query, key, value):
        return _tree_attention(query, key, value, tree, scaling, **kwargs), None
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return _eager(query, key, value, attention_mask, scaling, **kwargs), None
    groups, num_queries = query.shape[1] // key.shape[1], query.shape[2]
    shared_mask = attention_mask is None or (attention_mask.dim() == 4 and attention_mask.shape[1] == 1)
    sees_all = attention_mask is not None or num_queries == 1
    is_known = sees_all and shared_mask and not (dropout or query.is_cuda or "position_bias" in kwargs)
    if not is_known or (groups == 1 and not _is_slow(query)):
        arguments = (dropout, scaling, is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, *arguments, **kwargs)  # type: ignore[no-any-return]
    return grouped_attention(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None
) -> Tensor:
    """(B, h, T, D) from ``query`` (B, h, T, D), ``key`` and ``value`` (B, G, W, D), ``mask`` (B, 1, T, W) or None.

    Without a mask every query sees every slot.
    """
    batch, heads, num_queries, size = query.shape
    groups = heads // key.shape[1]
    is_block = groups > 1 and 1 < num_queries <= _FEW
    if query.is_cuda or not (is_block or _is_slow(query)):
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    rows = query.reshape(batch, key.shape[1], groups * num_queries, size)
    if rows.shape[2] == 1:
        rows = rows.expand(-1, -1, 2, -1)
    mask = None if mask is None else _repeated(mask, rows.shape[2] // num_queries, query.dtype)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)
    return out[:, :, : groups * num_queries].reshape(batch, heads, num_queries, value.shape[-1])


def _is_slow(query: Tensor) -> bool:
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


def _tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreePass,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """(B, T, h, D); ``softcap`` and ``s_aux`` (attention sinks) are what some families hand to their attention."""
    sinks = None if s_aux is None else s_aux.float()
    view = KVView(key, value, tree.pages)
    return tree_attention(query.transpose(1, 2), view, tree.mask, scaling, tree.window, softcap or 0.0, sinks)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Plain passes of the families that PyTorch's attention does not cover; without a mask they are causal."""
    heads, num_queries, size = query.shape[1:]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - num_queries)
    scores = scores.float().masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores.float() + mask
    if s_aux is not None:
        sinks = s_aux.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def use_kernels(model: Any) -> None:
    """Run the attention of ``model`` through this file; tree passes then take our kernel where it can run.

    Raises:
        UnsupportedModelError: the model kept another attention.
    """
    model.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    if config._attn_implementation != NAME or ALL_ATTENTION_FUNCTIONS[NAME] is not attention_forward:
        raise UnsupportedModelError(
            f"{type(model).__name__} kept attention {config._attn_implementation!r} instead of {NAME!r}"
        )


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
