"""Attention masks of tree passes: explicit 4D masks in the form that an unmodified transformers model takes.

Letters: B rows, T columns (new tokens) of the pass, W slots, n nodes of one row's tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.attention import MAX_AREA, TreeMask, pack_mask
from specdec.kernels.dispatch import choose

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
MASKED_IMPLEMENTATIONS = ("eager", "sdpa", "specdec")  # those that take a 4D mask


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """Who sees whom in one pass, in slot space; see :func:`visibility`."""

    limits: Tensor  # (B, T) how many leading slots each column sees
    positions: Tensor  # (B, T) position of each column
    bases: tuple[int, ...]  # (B,) the slot of each row's root; node i stands in slot base + i
    blocks: tuple[Tensor, ...]  # (B,) of (T, n): which nodes each column sees
    depths: tuple[Sequence[int], ...]  # (B,) of (n,)
    width: int  # W
    kept: tuple[int, ...]  # (B,) slots that every real column of a row sees


def visibility(plan: MaskPlan) -> Tensor:
    """(B, T, W) bool: which slots each column sees, windows left aside."""
    limits: Any = plan.limits
    blocks: Sequence[Any] = plan.blocks
    slots: Any = torch.arange(plan.width, device=limits.device)
    if limits.device.type == "cpu":  # NumPy's operators start sooner
        slots, limits, blocks = slots.numpy(), limits.numpy(), [block.numpy() for block in blocks]
    visible = slots < limits[:, :, None]
    for row, (base, block) in enumerate(zip(plan.bases, blocks, strict=True)):
        visible[row, :, base : base + block.shape[1]] |= block
    return torch.as_tensor(visible)


def slot_positions(plan: MaskPlan) -> Tensor:
    """(B, W) the position of what each slot holds."""
    positions = torch.arange(plan.width, device=plan.limits.device).repeat(len(plan.bases), 1)
    for row, (base, depths) in enumerate(zip(plan.bases, plan.depths, strict=True)):
        positions[row, base : base + len(depths)] = base + torch.as_tensor(depths, device=positions.device)
    return positions


def attach_tree_masks(
    masks: dict[str, Tensor], plan: MaskPlan, visible: Tensor, windows: dict[str, int], pages: Tensor | None
) -> None:
    """Let masks carry who sees whom as bits, where a kernel would read them; kinds without a window size stay plain.

    ``pages`` (B, any) int32 are those of each row; None: row i has line i of the cache.

    A model hands its masks to its attention untouched, so what a mask carries arrives there; where it does not, the
    mask itself says the same.
    """
    area = max(b + block.shape[1] - k for b, block, k in zip(plan.bases, plan.blocks, plan.kept, strict=True))
    device = visible.device
    if not 0 < area <= MAX_AREA or choose("tree_attention", device) is None:
        return
    kept = torch.tensor(plan.kept, device=device)
    slots = kept[:, None] + torch.arange(area, device=device)  # (B, A)
    inside = slots.clamp(max=plan.width - 1)[:, None].expand(-1, visible.shape[1], -1)
    seen = visible.gather(2, inside) & (slots < plan.width)[:, None]
    depths = slot_positions(plan).gather(1, slots.clamp(max=plan.width - 1)) - kept[:, None]
    queries = (plan.positions - kept[:, None]).clamp(min=0)  # padding stands before the kept slots
    tree = TreeMask(kept.int(), pack_mask(seen), area, queries.int().contiguous(), depths.int().contiguous())
    lines = torch.arange(len(plan.kept), device=device, dtype=torch.int32)[:, None]
    for kind, mask in masks.items():
        if kind in windows:
            mask.tree_pass = TreePass(  # type: ignore[attr-defined]
                tree, lines if pages is None else pages, windows[kind], pages is not None
            )


@dataclass(frozen=True, slots=True)
class TreePass:
    """What a mask carries for our kernel: the same visibility as bits, and which line of the cache each row has."""

    mask: TreeMask
    pages: Tensor  # (B, any) int32: lines, or the blocks of each row
    window: int  # 0: none
    is_paged: bool = False  # the keys and values are whole buffers (blocks, G, C, D)


@dataclass(frozen=True, slots=True)
class MaskStyle:
    """The masks that one model wants: kinds of layers, and bool or additive."""

    kinds: tuple[str, ...]
    by_layer_type: bool  # a dict keyed by kind instead of one tensor
    is_additive: bool
    dtype: torch.dtype
    window: int
    chunk: int
    for_kernels: bool = False  # masks also carry the form that our own attention kernel takes

    def build(self, plan: MaskPlan, pages: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """4D masks (B, 1, T, W): bool (True = seen) or additive, one or a dict by layer type; ``pages`` as for kernels."""
        visible = visibility(plan)
        masks = self.by_kind(visible, lambda: slot_positions(plan), plan.positions)
        if self.for_kernels:
            attach_tree_masks(masks, plan, visible, self.kernel_windows, pages)
        return self.arranged(masks)

    def by_kind(self, visible: Tensor, slots: Callable[[], Tensor], positions: Tensor) -> dict[str, Tensor]:
        """4D masks from what is visible but for windows (B, T, W) and the positions of ``slots`` (B, W) and columns (B, T)."""
        return {kind: self._finish(self._cut(visible, kind, slots, positions)) for kind in self.kinds}

    def arranged(self, masks: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """As the model takes them."""
        return masks if self.by_layer_type else masks[self.kinds[0]]

    @property
    def takes_pages(self) -> bool:
        """Whether our kernel can read every layer from its pages."""
        return self.for_kernels and set(self.kinds) <= {FULL, SLIDING}

    @property
    def kernel_windows(self) -> dict[str, int]:
        """The window of each kind that our kernel knows, 0: none."""
        return {FULL: 0, SLIDING: self.window}

    def _cut(self, visible: Tensor, kind: str, slots: Callable[[], Tensor], positions: Tensor) -> Tensor:
        """Windows count positions, never slots: siblings share a position."""
        if kind == FULL:
            return visible
        near: Tensor = self.within(kind, slots()[:, None], positions[:, :, None])
        return visible & near

    def within(self, kind: str, keys: Any, queries: Any) -> Any:
        """Whether the window or chunk of ``kind`` lets ``queries`` see ``keys``: positions that broadcast."""
        return keys > queries - self.window if kind == SLIDING else keys // self.chunk == queries // self.chunk

    def _finish(self, visible: Tensor) -> Tensor:
        if not self.is_additive:
            return visible[:, None]
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[:, None]


def mask_style(
    config: Any, implementation: str, dtype: torch.dtype, module: ModuleType, by_layer_type: bool
) -> MaskStyle | str:
    """The masks for a model, or a sentence that says why 4D masks cannot express its attention.

    ``config`` is that of the text model and ``module`` the one that defines it: a window in the config of a model
    whose code makes no windows (many Llama checkpoints hold one) is not used. ``by_layer_type``: its code takes a mask
    for each type of layer in the config.
    """
    if implementation not in MASKED_IMPLEMENTATIONS:
        return f"attention implementation {implementation!r} takes no 4D mask (load it with attn_implementation='sdpa')"
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if by_layer_type:
        kinds = tuple(sorted(set(config.layer_types)))
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
    return MaskStyle(
        kinds,
        by_layer_type,
        implementation == "eager",
        dtype,
        window or 0,
        chunk or 0,
        for_kernels=implementation == "specdec",
    )
