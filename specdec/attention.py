"""Attention masks of tree passes: explicit 4D masks in the form that an unmodified transformers model takes.

Letters: B rows, T columns (new tokens) of the pass, W slots, n nodes of one row's tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
MASKED_IMPLEMENTATIONS = ("eager", "sdpa", "specdec")  # those that take a 4D mask


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """Who sees whom in one pass, in slot space; see :func:`visibility`."""

    limits: Tensor  # (B, T) how many leading slots each column sees
    positions: Tensor  # (B, T) position of each column
    bases: tuple[int, ...]  # (B,) the slot of each row's root; node i stands in slot base + i
    blocks: tuple[Tensor, ...]  # (B,) of (T, n): which nodes each column sees
    depths: tuple[Tensor, ...]  # (B,) of (n,)
    width: int  # W


def visibility(plan: MaskPlan) -> Tensor:
    """(B, T, W) bool: which slots each column sees, windows left aside."""
    slots = torch.arange(plan.width, device=plan.limits.device)
    visible = slots < plan.limits[:, :, None]
    for row, (base, block) in enumerate(zip(plan.bases, plan.blocks, strict=True)):
        visible[row, :, base : base + block.shape[1]] |= block
    return visible


def slot_positions(plan: MaskPlan) -> Tensor:
    """(B, W) the position of what each slot holds."""
    positions = torch.arange(plan.width, device=plan.limits.device).repeat(len(plan.bases), 1)
    for row, (base, depths) in enumerate(zip(plan.bases, plan.depths, strict=True)):
        positions[row, base : base + len(depths)] = base + depths
    return positions


@dataclass(frozen=True, slots=True)
class MaskStyle:
    """The masks that one model wants: kinds of layers, and bool or additive."""

    kinds: tuple[str, ...]
    by_layer_type: bool  # a dict keyed by kind instead of one tensor
    is_additive: bool
    dtype: torch.dtype
    window: int
    chunk: int

    def build(self, plan: MaskPlan) -> Tensor | dict[str, Tensor]:
        """4D masks (B, 1, T, W): bool (True = seen) or additive, one or a dict by layer type."""
        visible = visibility(plan)
        masks = {kind: self._finish(self._cut(visible, kind, plan)) for kind in self.kinds}
        return masks if self.by_layer_type else masks[self.kinds[0]]

    def _cut(self, visible: Tensor, kind: str, plan: MaskPlan) -> Tensor:
        """Windows count positions, never slots: siblings share a position."""
        if kind == FULL:
            return visible
        keys, queries = slot_positions(plan)[:, None], plan.positions[:, :, None]
        if kind == SLIDING:
            return visible & (keys > queries - self.window)
        return visible & (keys // self.chunk == queries // self.chunk)

    def _finish(self, visible: Tensor) -> Tensor:
        if not self.is_additive:
            return visible[:, None]
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[:, None]


def mask_style(config: Any, implementation: str, dtype: torch.dtype, module: ModuleType) -> MaskStyle | str:
    """The masks for a model, or a sentence that says why 4D masks cannot express its attention.

    ``config`` is that of the text model and ``module`` the one that defines it: a window in the config of a model
    whose code makes no windows (many Llama checkpoints hold one) is not used.
    """
    if implementation not in MASKED_IMPLEMENTATIONS:
        return f"attention implementation {implementation!r} takes no 4D mask (load it with attn_implementation='sdpa')"
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    layer_types: Sequence[str] | None = getattr(config, "layer_types", None)
    if layer_types is not None:
        kinds = tuple(sorted(set(layer_types)))
    elif window and hasattr(module, "create_sliding_window_causal_mask"):
        kinds = (SLIDING,)
    elif chunk and hasattr(module, "create_chunked_causal_mask"):
        kinds = (CHUNKED,)
    elif (window or chunk) and not module.__name__.startswith("transformers."):
        return "its own code may cut a window into the attention"
    else:
        kinds = (FULL,)
    unknown = [kind for kind in kinds if kind not in (FULL, SLIDING, CHUNKED)]
    if unknown:
        return f"layers of type {', '.join(unknown)} keep a state that cannot branch"
    if (SLIDING in kinds and not window) or (CHUNKED in kinds and not chunk):
        return f"layer types {', '.join(kinds)} without a window or chunk size in the config"
    return MaskStyle(kinds, layer_types is not None, implementation == "eager", dtype, window or 0, chunk or 0)
