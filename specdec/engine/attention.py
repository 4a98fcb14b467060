"""Our attention, registered with transformers under the name "specdec": kernels, grouped heads, and rows in one line.

Letters: B rows, h heads, G key-value heads, T queries, N columns of a flat pass, W slots, S slots of a pool, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.engine.flat_pass import FlatPass, running_pass
from specdec.engine.grouped_attention import grouped_attention, is_slow
from specdec.engine.masks import TreePass
from specdec.engine.shared_copy import kept_copy, shares_attention, sharing_copy
from specdec.errors import UnsupportedModelError
from specdec.kernels.attention import KVView, lacking, tree_attention

NAME = "specdec"


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
    flat = running_pass()
    if flat is not None:
        return _each_row(flat, query, key, value, attention_mask, scaling, **kwargs), None
    tree: TreePass | None = getattr(attention_mask, "tree_pass", None)
    if tree is not None and not dropout and scaling is not None and not lacking(query, key, value):
        return _tree_attention(query, key, value, tree, scaling, **kwargs), None
    if tree is not None and tree.is_paged and attention_mask is not None:
        key, value = (_gathered(buffer, tree.pages, attention_mask.shape[-1]) for buffer in (key, value))
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return _eager(query, key, value, attention_mask, scaling, **kwargs), None
    groups, num_queries = query.shape[1] // key.shape[1], query.shape[2]
    shared_mask = attention_mask is None or (attention_mask.dim() == 4 and attention_mask.shape[1] == 1)
    sees_all = attention_mask is not None or num_queries == 1
    is_known = sees_all and shared_mask and not (dropout or query.is_cuda or "position_bias" in kwargs)
    if not is_known or (groups == 1 and not is_slow(query)):
        arguments = (dropout, scaling, is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, *arguments, **kwargs)  # type: ignore[no-any-return]
    return grouped_attention(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def _each_row(
    flat: FlatPass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    marker: Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> Tensor:
    """(1, N, h, D): each row's columns of ``query`` (1, h, N, D) over its own slots of whole buffers (1, G, S, D)."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return _eager(q, k, v, mask, scaling, **kwargs).transpose(1, 2)

        out = flat.attend_with(attend, query, key, value, flat.kind_of(marker))
    else:
        out = flat.attend_plainly(query, key, value, flat.kind_of(marker), scaling)
    return out.transpose(1, 2).contiguous()


def _gathered(buffer: Tensor, pages: Tensor, width: int) -> Tensor:
    """(B, G, width, D) what each row sees of ``buffer`` (blocks, G, C, D)."""
    missing = -(-width // buffer.shape[2]) - pages.shape[1]
    if missing > 0:  # slots of padding columns, which nobody sees
        pages = torch.cat((pages, pages[:, :1].expand(-1, missing)), 1)
    return buffer[pages.long()].transpose(1, 2).flatten(2, 3)[:, :, :width]


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


def attention_copy(model: Any) -> Any:
    """``model`` on our attention: a copy that shares all else with it, kept as by ``kept_copy``.

    Raises:
        UnsupportedModelError: the model keeps another attention, or a part of it with an attention has a forward of
            its own.
    """
    return kept_copy("attention", model, _on_our_attention)


def on_our_attention(model: Any) -> Any:
    """``attention_copy`` where that can be; else ``model`` as it is, for which what rows see is gathered."""
    try:
        return attention_copy(model)
    except UnsupportedModelError:
        return model


def _on_our_attention(model: Any) -> Any:
    if model.config.get_text_config()._attn_implementation == NAME:
        return model
    ours = sharing_copy(model)
    if ours is model or shares_attention(ours):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run on another attention beside its own: it, or a model within it, was given "
            "a forward of its own; remove that first"
        )
    use_kernels(ours)
    return ours


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
