"""Key-value storage of a batch of ragged rows; the only file that touches transformers' cache internals.

Every row owns one line of each layer's buffer and fills it from slot 0 without holes: slot = position. The nodes of
the tree being scored follow in node order, and accepted ones are moved forward in place. Knows nothing of trees.
Letters: R buffer rows, C slots (capacity), B rows of this pass, T new tokens a row, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.kernels.commit import KVBuffers, commit_kv
from specdec.kernels.dispatch import choose

_ROUND = 64  # slots: capacities are multiples of this


@dataclass(slots=True)
class Pass:
    """Where one forward pass writes and how much it reads."""

    first_row: int = 0  # the pass covers buffer rows first_row : first_row + B
    start: int = 0  # slots in use before the pass (the longest row's)
    width: int = 0  # slots read: columns of the attention mask
    slots: Tensor | None = None  # (B, T) where each new token goes; None: start, start + 1, ... in every row


@dataclass(frozen=True, slots=True)
class Move:
    """In one row the slots ``start`` + ``path`` become ``start``, ``start`` + 1 and so on."""

    row: int
    start: int
    path: list[int]  # ascending


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's buffers (R, G, C, D), allocated at the first update from the shapes that the layer really has."""

    is_compileable = False
    is_croppable = True
    is_sliding = False  # windows are in the masks: a sliding buffer would count holes of other rows

    def __init__(self, current: Pass, num_rows: int) -> None:
        super().__init__()
        self.current = current
        self.num_rows = num_rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN would still be NaN.
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            _zeros(t, self.num_rows, t.shape[1], _rounded(self.current.width), t.shape[3])
            for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' (B, G, T, D) and return all keys and values (B, G, width, D) of these rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        else:
            self.grow()
            self.keys, self.values = widened(self.keys, key_states), widened(self.values, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def grow(self) -> None:
        """Make room for the pass and the reserved rows."""
        if self.current.width > self.keys.shape[2] or self.num_rows > self.keys.shape[0]:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        now = self.current
        is_whole = states.shape[0] == buffer.shape[0]
        lines = buffer if is_whole else buffer.narrow(0, now.first_row, states.shape[0])
        if now.slots is None:
            lines.narrow(2, now.start, states.shape[2]).copy_(states)
        else:
            rows = torch.arange(states.shape[0], device=states.device)[:, None]
            lines[rows, :, now.slots] = states.transpose(1, 2)
        return lines.narrow(2, 0, now.width)

    def _grown(self, buffer: Tensor) -> Tensor:
        rows, heads, capacity, size = buffer.shape
        wanted = capacity if self.current.width <= capacity else _rounded(max(self.current.width, capacity * 3 // 2))
        grown = _zeros(buffer, max(rows, self.num_rows), heads, wanted, size)
        grown[:rows, :, :capacity] = buffer
        return grown

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.current.start + query_length, 0

    def get_seq_length(self) -> int:
        return self.current.start

    def get_max_length(self) -> int:
        return -1


class RaggedCache:
    """The buffers of all layers, and the moves inside them."""

    def __init__(self, num_layers: int) -> None:
        self.current = Pass()
        self.layers = [RaggedLayer(self.current, 0) for _ in range(num_layers)]
        self.past_key_values = Cache(layers=list(self.layers))
        self._table: KVBuffers | None = None

    def reserve_rows(self, num_rows: int) -> None:
        """Make room for ``num_rows`` rows at the next pass; room is never given back."""
        for layer in self.layers:
            layer.num_rows = max(layer.num_rows, num_rows)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor] | None]:
        """Each layer's keys and values (R, G, C, D); None where no pass has written anything."""
        return [(layer.keys, layer.values) if layer.is_initialized else None for layer in self.layers]

    @property
    def capacity(self) -> int:
        """C, the slots that every buffer has; 0 before the first pass."""
        return min((pair[0].shape[2] for pair in self.pairs if pair), default=0)

    def make_room(self, width: int) -> None:
        """Grow what there is to ``width`` slots and the reserved rows, ahead of a pass."""
        self.current.width = width
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow()

    def begin_pass(self, first_row: int, start: int, width: int, slots: Tensor | None) -> None:
        now = self.current
        now.first_row, now.start, now.width, now.slots = first_row, start, width, slots

    def move_slots(self, moves: Sequence[Move]) -> None:
        """Make ``moves`` in every layer, at most one for each row."""
        buffers = [buffer for pair in self.pairs if pair for buffer in pair]
        if not buffers or not moves:
            return
        if choose("commit_kv", buffers[0].device) is not None and self._moved_by_kernel(buffers, moves):
            return
        for move in moves:
            first = next((i for i, slot in enumerate(move.path) if slot != i), 0)
            source = torch.tensor(move.path[first:], device=buffers[0].device) + move.start
            for buffer in buffers:
                moved = buffer[move.row].index_select(1, source.to(buffer.device))
                buffer[move.row, :, move.start + first : move.start + len(move.path)] = moved

    def _moved_by_kernel(self, buffers: list[Tensor], moves: Sequence[Move]) -> bool:
        """One copy to the device and one launch for all rows and layers; False where layers differ in layout."""
        if self._table is None or any(a is not b for a, b in zip_longest(self._table.tensors, buffers)):
            try:
                self._table = KVBuffers.of(buffers)
            except ValueError:
                return False
        num_rows, longest = len(moves), max(len(move.path) for move in moves)
        words = [*(m.start for m in moves), *(len(m.path) for m in moves), *(m.row for m in moves)]
        words += [slot for m in moves for slot in (*m.path, *[0] * (longest - len(m.path)))]
        device = buffers[0].device
        on_host = torch.tensor(words, dtype=torch.int32, pin_memory=device.type == "cuda")
        sizes = [num_rows, num_rows, num_rows, num_rows * longest]
        starts, counts, rows, paths = torch.split(on_host.to(device, non_blocking=True), sizes)
        commit_kv(self._table, starts, paths.view(num_rows, longest), counts, rows.view(num_rows, 1))
        return True

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` slots of one row over another row's."""
        for layer in self.layers:
            if layer.is_initialized and length:  # without any, the source may be a row that no pass has made room for
                for buffer in (layer.keys, layer.values):
                    buffer[target, :, :length] = buffer[source, :, :length]


def widened(buffer: Tensor, states: Tensor) -> Tensor:
    """``buffer`` in a dtype that holds ``states`` too: a first pass under autocast may have had a narrower one."""
    if buffer.dtype == states.dtype:
        return buffer
    with torch.inference_mode(False):
        return buffer.to(torch.promote_types(buffer.dtype, states.dtype))


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Of the dtype and device of ``like``; later passes may write to them in inference mode and outside."""
    with torch.inference_mode(False):
        return like.new_zeros(shape)


def _rounded(slots: int) -> int:
    return -(-slots // _ROUND) * _ROUND
