"""``tree_attention``: all nodes of a tree against a kept prefix and each other, dense or paged.

Letters: B rows, n queries, A slots of the tree's area, W words of bits, Hq query heads, G key-value heads, D head
size, C slots a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.commit import check_layout
from specdec.kernels.dispatch import choose
from specdec.kernels.launch import C_TYPES, Argument, Backend, int32, require

FILE = "attention.cu"
HEAD_SIZES = (64, 80, 96, 128, 256)
MAX_AREA = 256
MAX_SPLITS, MIN_SPLIT = 16, 256  # as in cuda/attention.cuh
_DENSE_SHIFT = 30  # one page is longer than any row
_WARPS = 4
_SHAPE = np.dtype(
    [
        (name, np.int32)
        for name in ("queries", "heads", "kv_heads", "area", "words", "row_pages", "shift", "window", "capacity")
    ]
    + [(name, np.float32) for name in ("scale", "softcap")]
    + [(name, np.int64) for name in ("query", "node", "query_head", "page", "head", "slot")],
    align=True,
)


@dataclass(frozen=True, slots=True)
class KVView:
    """Keys and values and where each row's slots are. A dense cache has one page a row, of any length."""

    keys: Tensor  # (pages, G, C, D), heads contiguous
    values: Tensor  # as keys, with the same strides
    pages: Tensor  # (B, pages a row) int32, in order; C is a power of two unless there is one


@dataclass(frozen=True, slots=True)
class TreeMask:
    """Who sees whom: everybody the kept slots, and of the tree's area behind them what the bits say.

    A window counts positions, not slots: queries and nodes then need their depths (a position is length + depth, and
    no depth is negative). Slots of the area must hold finite numbers, seen or not; what of it lies behind the row's
    pages is left out.
    """

    lengths: Tensor  # (B,) int32 kept slots; node j of the area stands in slot length + j
    bits: Tensor  # (B, n, W) int64: bit j % 64 of word j // 64 says that the query sees node j
    area: int  # A, at most 64 W
    query_depths: Tensor | None = None  # (B, n) int32
    node_depths: Tensor | None = None  # (B, A) int32


def expressions(dtype: torch.dtype, size: int, is_capped: bool = False) -> tuple[str, ...]:
    """The kernels of one dtype and head size, with or without a softcap."""
    name, capped = C_TYPES[dtype], str(is_capped).lower()
    is_float = dtype is torch.float32
    split = f"tree_attention_f32<{size}, {capped}>" if is_float else f"tree_attention_mma<{name}, {size}, {capped}>"
    return split, f"combine_splits<{name}, {size}>"


def shared_bytes(dtype: torch.dtype, size: int) -> int:
    """Dynamic shared memory of a block."""
    if dtype is torch.float32:
        return 4 * (16 * size + 32 * (size + 1) + 32 * size)
    tiles = 4 * (32 if size > 128 else 64) + (64 if size > 128 else 0)
    return 2 * tiles * (size + 8)


def tree_attention(
    query: Tensor,
    kv: KVView,
    mask: TreeMask,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention (B, n, Hq, D); computed in float32, returned in the dtype of ``query``.

    The result of a query depends on the kept length and on what it sees alone, bit for bit: not on the other queries
    or rows.

    Args:
        query: (B, n, Hq, D), heads contiguous; float32, float16 or bfloat16.
        scale: what scores are multiplied by.
        window: a query sees positions above its own minus this; 0: all.
        softcap: scores become softcap * tanh(score / softcap); 0: off.
        sinks: (Hq,) float32, one more score in each head's softmax, of a value of 0.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    _check(query, kv, mask, window, softcap, sinks)
    backend = choose("tree_attention", query.device, lacking(query, kv.keys, kv.values))
    if backend is None:
        return tree_attention_torch(query, kv, mask, scale, window, softcap, sinks)
    return _launch(backend, query, kv, mask, (scale, window, softcap), sinks)


def lacking(query: Tensor, keys: Tensor, values: Tensor) -> str:
    """Why there is no kernel for heads of these dtypes and sizes (their last dimension); empty if there is one."""
    size = query.shape[-1]
    if query.dtype not in C_TYPES or keys.dtype != query.dtype or values.dtype != query.dtype:
        return f"there is no kernel for {query.dtype} queries, {keys.dtype} keys and {values.dtype} values"
    if keys.shape[-1] != size or values.shape[-1] != size:
        return f"there is no kernel for keys of size {keys.shape[-1]} with values of size {values.shape[-1]}"
    if size not in HEAD_SIZES:
        return f"there is no kernel for head size {size} (there is for {', '.join(map(str, HEAD_SIZES))})"
    return ""


def _check(query: Tensor, kv: KVView, mask: TreeMask, window: int, softcap: float, sinks: Tensor | None) -> None:
    if query.dim() != 4 or kv.keys.dim() != 4 or query.numel() == 0:
        raise ValueError(
            f"query must be (B, n, Hq, D) and keys (pages, G, C, D), got {tuple(query.shape)} and {tuple(kv.keys.shape)}"
        )
    rows, queries, heads, size = query.shape
    if kv.keys.shape != kv.values.shape or kv.keys.stride() != kv.values.stride():
        raise ValueError(f"keys and values must have one shape and layout, got {kv.keys.shape} and {kv.values.shape}")
    _, kv_heads, page_size, kv_size = kv.keys.shape
    if kv_size != size or heads % kv_heads:
        raise ValueError(f"{heads} query heads of size {size} do not fit {kv_heads} key-value heads of size {kv_size}")
    check_layout("keys", kv.keys)
    check_layout("query", query)
    require("pages", kv.pages, torch.int32, (rows, None), query)
    if kv.pages.shape[1] > 1 and page_size & (page_size - 1):
        raise ValueError(f"pages must hold a power of two of slots, got {page_size}")
    require("lengths", mask.lengths, torch.int32, (rows,), query)
    require("bits", mask.bits, torch.int64, (rows, queries, None), query)
    if not 0 < mask.area <= min(MAX_AREA, 64 * mask.bits.shape[2]):
        raise ValueError(f"the area must have 1 to {min(MAX_AREA, 64 * mask.bits.shape[2])} slots, got {mask.area}")
    if window < 0 or softcap < 0:
        raise ValueError(f"window and softcap must not be negative, got {window} and {softcap}")
    if window and (mask.query_depths is None or mask.node_depths is None):
        raise ValueError("a window needs query_depths and node_depths")
    if mask.query_depths is not None and mask.node_depths is not None:
        require("query_depths", mask.query_depths, torch.int32, (rows, queries), query)
        require("node_depths", mask.node_depths, torch.int32, (rows, mask.area), query)
    if sinks is not None:
        require("sinks", sinks, torch.float32, (heads,), query)


def _launch(
    backend: Backend,
    query: Tensor,
    kv: KVView,
    mask: TreeMask,
    numbers: tuple[float, int, float],
    sinks: Tensor | None,
) -> Tensor:
    rows, queries, heads, size = query.shape
    _, kv_heads, page_size, _ = kv.keys.shape
    row_pages, is_float = kv.pages.shape[1], query.dtype is torch.float32
    # As many splits as the longest row that fits could need; those that a row does not need end at once.
    splits = min(MAX_SPLITS, -(-row_pages * page_size // MIN_SPLIT))
    scale, window, softcap = numbers
    split_kernel, combine = backend.load(FILE, expressions(query.dtype, size, softcap > 0))
    shift = _DENSE_SHIFT if row_pages == 1 else page_size.bit_length() - 1
    shape = np.array(
        [
            (
                *(queries, heads, kv_heads, mask.area, mask.bits.shape[2], row_pages, shift, window),
                *(row_pages * page_size, scale, softcap),
                *query.stride()[:3],
                *kv.keys.stride()[:3],
            )
        ],
        _SHAPE,
    )
    sums = backend.empty((splits, rows, heads, queries, size), torch.float32, query.device)
    weights = backend.empty((splits, rows, heads, queries, 2), torch.float32, query.device)
    out = backend.empty((rows, queries, heads, size), query.dtype, query.device)
    tiles = -(-queries * (heads // kv_heads) // (16 if is_float else 64))
    inputs: tuple[Argument, ...] = (query, kv.keys, kv.values, kv.pages, mask.lengths, mask.bits)
    inputs += (mask.query_depths, mask.node_depths)
    grid = (splits, kv_heads * tiles, rows)
    split_kernel(grid, 32 * _WARPS, (*inputs, sums, weights, shape), shared_bytes(query.dtype, size))
    warps = rows * heads * queries
    combine((-(-warps // _WARPS),), 32 * _WARPS, (sums, weights, mask.lengths, sinks, out, int32(rows), shape))
    return out


def tree_attention_torch(
    query: Tensor,
    kv: KVView,
    mask: TreeMask,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The twin of :func:`tree_attention`: a dense mask, in float32 (float64 if ``query`` is), without host reads."""
    group = query.shape[2] // kv.keys.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (
        buffer[kv.pages.long()].transpose(1, 2).flatten(2, 3).to(wide).repeat_interleave(group, 1)
        for buffer in (kv.keys, kv.values)
    )
    scores = query.to(wide).transpose(1, 2) @ keys.transpose(2, 3) * scale  # (B, Hq, n, slots)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_slots(mask, keys.shape[2], window)[:, None]
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]].nan_to_num(0.0)
    # An unseen slot may never have been written.
    values = values.masked_fill(~visible.any(2)[..., None], 0.0)
    return (weights @ values).transpose(1, 2).to(query.dtype).contiguous()


def visible_slots(mask: TreeMask, slots: int, window: int = 0) -> Tensor:
    """(B, n, slots) bool: what each query sees."""
    places = torch.arange(slots, device=mask.bits.device)
    nodes = places - mask.lengths[:, None].long()  # (B, slots)
    inside = (nodes >= 0) & (nodes < mask.area)
    index = nodes.clamp(0, mask.area - 1)
    words = mask.bits.gather(2, (index >> 6)[:, None].expand(-1, mask.bits.shape[1], -1))
    seen = (nodes < 0)[:, None] | (inside[:, None] & ((words >> (index & 63)[:, None]) & 1).bool())
    if window and mask.query_depths is not None and mask.node_depths is not None:
        lengths = mask.lengths[:, None].long()
        positions = torch.where(nodes < 0, places, lengths + mask.node_depths.long().gather(1, index))
        seen &= positions[:, None] > (lengths + mask.query_depths)[:, :, None] - window
    return seen


def pack_mask(seen: Tensor) -> Tensor:
    """(B, n, W) int64 bits of a bool matrix (B, n, A)."""
    rows, queries, area = seen.shape
    words = (area + 63) // 64
    padded = torch.nn.functional.pad(seen, (0, words * 64 - area)).view(rows, queries, words, 64).long()
    return (padded << torch.arange(64, device=seen.device)).sum(-1)
