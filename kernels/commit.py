"""``commit_kv``: keep the accepted path's keys and values, for all layers in one launch.

Letters: B rows, P longest path, L layers, G key-value heads, D head size, C slots a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.dispatch import choose
from specdec.kernels.launch import Argument, int32, int64, require

FILE = "commit.cu"
EXPRESSIONS = ("commit_kv",)
_VECTOR = 16  # bytes moved at once


@dataclass(frozen=True, slots=True)
class KVBuffers:
    """Keys and values of all layers, each (pages, G, C, D), and where their addresses stand on the device.

    A dense cache has one page a row, as long as its capacity. Make it once: a captured graph holds the addresses.

    Raises:
        ValueError: buffers of different shape, strides, dtype or device, or heads that do not fill 16 bytes.
    """

    tensors: tuple[Tensor, ...]  # keys and values of all layers, in any order
    addresses: Tensor  # (2 L,) int64

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> KVBuffers:
        first = tensors[0]
        for tensor in tensors:
            same = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if same != (first.shape, first.stride(), first.dtype, first.device) or tensor.dim() != 4:
                raise ValueError(
                    "keys and values of all layers must be (pages, heads, slots, size) of one shape, dtype, layout and "
                    f"device, got {tuple(first.shape)} and {tuple(tensor.shape)}; commit groups of equal layers apart"
                )
            if tensor.data_ptr() % _VECTOR:
                raise ValueError(f"buffers must be aligned to {_VECTOR} bytes")
        check_layout("buffers", first)
        addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], device=first.device)
        return cls(tuple(tensors), addresses)


def check_layout(name: str, buffer: Tensor) -> None:
    """Raises ValueError unless heads are contiguous and all steps are multiples of 16 bytes."""
    steps = (buffer.shape[3], *buffer.stride()[:3])
    if buffer.stride(3) != 1 or any(step * buffer.element_size() % _VECTOR for step in steps):
        raise ValueError(
            f"{name} must have contiguous heads of a multiple of {_VECTOR} bytes, got size {buffer.shape[3]} of "
            f"{buffer.dtype} with strides {buffer.stride()}"
        )


def commit_kv(buffers: KVBuffers, starts: Tensor, path: Tensor, counts: Tensor, pages: Tensor) -> None:
    """Move, in place, the slot of each row's node ``path[i]`` to the slot of node i, i below ``counts``.

    Args:
        starts: (B,) int32, the slot of each row's root; node i stands in slot start + i.
        path: (B, P) int32, ascending nodes, the root first (``walk_tree``, ``reject_tree``).
        counts: (B,) int32, nodes in each path.
        pages: (B, any) int32, the pages of each row in order; dense: its line of the buffer, (B, 1).

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    like = buffers.addresses
    require("path", path, torch.int32, (None, None), like)
    require("starts", starts, torch.int32, (len(path),), like)
    require("counts", counts, torch.int32, (len(path),), like)
    require("pages", pages, torch.int32, (len(path), None), like)
    backend = choose("commit_kv", like.device)
    if backend is None:
        commit_kv_torch(buffers, starts, path, counts, pages)
        return
    (kernel,) = backend.load(FILE, EXPRESSIONS)
    first = buffers.tensors[0]
    per_vector = _VECTOR // first.element_size()
    page_stride, head_stride, slot_stride, _ = first.stride()
    _, heads, page_size, size = first.shape
    sizes: tuple[Argument, ...] = (
        *map(int32, (path.shape[1], pages.shape[1], page_size, heads, size // per_vector)),
        *(int64(stride // per_vector) for stride in (page_stride, head_stride, slot_stride)),
    )
    kernel((len(buffers.tensors), len(path)), 256, (buffers.addresses, pages, starts, path, counts, *sizes))


def commit_kv_torch(buffers: KVBuffers, starts: Tensor, path: Tensor, counts: Tensor, pages: Tensor) -> None:
    """The twin of :func:`commit_kv`; places behind ``counts`` are moved onto themselves, without host reads."""
    page_size = buffers.tensors[0].shape[2]
    order = torch.arange(path.shape[1], device=path.device).expand_as(path)
    is_on = order < counts[:, None]
    # The root moves onto itself, as often as needed: all writes to its slot are equal.
    source, target = (torch.where(is_on, nodes, 0) + starts[:, None] for nodes in (path, order))
    from_page, to_page = (pages.gather(1, (slots // page_size).long()).long() for slots in (source, target))
    for tensor in buffers.tensors:
        held = tensor[from_page, :, (source % page_size).long()]
        tensor[to_page, :, (target % page_size).long()] = held
