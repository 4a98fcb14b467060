"""Key-value storage of a batch of ragged rows; the only file that touches transformers' cache internals.

Every row owns one line of each layer's buffer and fills it from slot 0 without holes: slot = position. The nodes of
the tree being scored follow in node order, and accepted ones are moved forward in place. Knows nothing of trees.
Letters: R buffer rows, C slots (capacity), B rows of this pass, T new tokens a row, G key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_ROUND = 64  # slots: capacities are multiples of this


@dataclass(slots=True)
class Pass:
    """Where one forward pass writes and how much it reads."""

    first_row: int = 0  # the pass covers buffer rows first_row : first_row + B
    start: int = 0  # slots in use before the pass (the longest row's)
    width: int = 0  # slots read: columns of the attention mask
    slots: Tensor | None = None  # (B, T) where each new token goes; None: start, start + 1, ... in every row


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
            t.new_zeros(self.num_rows, t.shape[1], _rounded(self.current.width), t.shape[3])
            for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' (B, G, T, D) and return all keys and values (B, G, width, D) of these rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.current.width > self.keys.shape[2] or self.num_rows > self.keys.shape[0]:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

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
        grown = buffer.new_zeros(max(rows, self.num_rows), heads, wanted, size)
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

    def reserve_rows(self, num_rows: int) -> None:
        """Make room for ``num_rows`` rows at the next pass; room is never given back."""
        for layer in self.layers:
            layer.num_rows = max(layer.num_rows, num_rows)

    def begin_pass(self, first_row: int, start: int, width: int, slots: Tensor | None) -> None:
        now = self.current
        now.first_row, now.start, now.width, now.slots = first_row, start, width, slots

    def move_slots(self, row: int, source: Tensor, target: slice) -> None:
        """Copy the slots ``source`` (k,) of a row to the ``k`` slots ``target``, in every layer."""
        for layer in self.layers:
            if layer.is_initialized:
                for buffer in (layer.keys, layer.values):
                    buffer[row, :, target] = buffer[row].index_select(1, source.to(buffer.device))

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` slots of one row over another row's."""
        for layer in self.layers:
            if layer.is_initialized:
                for buffer in (layer.keys, layer.values):
                    buffer[target, :, :length] = buffer[source, :, :length]


def _rounded(slots: int) -> int:
    return -(-slots // _ROUND) * _ROUND
