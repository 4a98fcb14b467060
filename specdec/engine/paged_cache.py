"""Key-value storage in pages: all rows in one buffer a layer, each slot where its row's block table says.

Letters: S slots of the pool, B rows of a pass, T columns, W slots read, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.engine.cache import widened
from specdec.kernels.dispatch import mode


@dataclass(slots=True)
class PagedSlots:
    """Where one forward pass writes and what it reads, in slots of the pool."""

    write: Tensor | None = None  # (B T,) where each column's keys go; None: a stretch from ``first`` on
    first: int = 0
    read: Tensor | None = None  # (B, W) what each row sees; None: attention finds its slots in the whole buffer
    by_pages: bool = False  # which it is handed as blocks (blocks, G, C, D)
    start: int = 0  # slots in use before the pass: the longest row's


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's buffers (G, S, D), made at the first update from the shapes that the layer really has.

    The last slot belongs to no block: what padding columns write goes there.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # windows are in the masks

    def __init__(self, current: PagedSlots, num_slots: int, block_size: int) -> None:
        super().__init__()
        self.current = current
        self.num_slots, self.block_size = num_slots, block_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (_buffer(t, self.num_slots + 1) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' (B, G, T, D); return what each row sees (B, G, W, D), or the whole buffer (1, G, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = widened(self.keys, key_states), widened(self.values, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        now = self.current
        rows, heads, columns, size = states.shape
        lines = states[0] if rows == 1 else states.transpose(0, 1).reshape(heads, rows * columns, size)
        if now.write is None:
            buffer.narrow(1, now.first, rows * columns).copy_(lines)
        else:
            buffer.index_copy_(1, now.write, lines.to(buffer.dtype))
        if now.by_pages:
            num_blocks = self.num_slots // self.block_size
            return buffer.narrow(1, 0, self.num_slots).view(heads, num_blocks, self.block_size, size).transpose(0, 1)
        return buffer[None] if now.read is None else buffer[:, now.read].transpose(0, 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.current.start + query_length, 0

    def get_seq_length(self) -> int:
        return self.current.start

    def get_max_length(self) -> int:
        return -1


class PagedCache:
    """The buffers of all layers for a pool of ``num_slots``."""

    def __init__(self, num_layers: int, num_slots: int, block_size: int) -> None:
        self.current = PagedSlots()
        self.num_slots = num_slots
        self.layers = [PagedLayer(self.current, num_slots, block_size) for _ in range(num_layers)]
        self.past_key_values = Cache(layers=list(self.layers))

    def begin_pass(self, write: Tensor, read: Tensor | None, start: int, by_pages: bool = False) -> None:
        """The next pass writes to the slots ``write`` (B T,) and reads ``read`` (B, W), or whatever attention picks."""
        now, first = self.current, int(write[0])
        now.by_pages = by_pages
        is_stretch = bool((write[1:] - write[:-1] == 1).all())
        now.write, now.first, now.read, now.start = None if is_stretch else write, first, read, start

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy slots in every layer, as if all at once."""
        if not len(sources):
            return
        moves: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            if layer.is_initialized:
                device = layer.keys.device
                if device not in moves:
                    moves[device] = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
                source, target = moves[device]
                for buffer in (layer.keys, layer.values):
                    buffer.index_copy_(1, target, buffer.index_select(1, source))

    @property
    def num_bytes(self) -> int:
        """Of all buffers that exist."""
        buffers = [buffer for layer in self.layers if layer.is_initialized for buffer in (layer.keys, layer.values)]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def _buffer(like: Tensor, num_slots: int) -> Tensor:
    """(G, S, D), written to in inference mode and outside. Memory that no slot uses is never touched on a CPU."""
    shape = (like.shape[1], num_slots, like.shape[3])
    with torch.inference_mode(False):
        is_read_whole = like.device.type != "cpu" or mode() != "torch"  # kernels want numbers in slots that are masked
        return like.new_zeros(shape) if is_read_whole else like.new_empty(shape)
