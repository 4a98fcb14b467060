"""One forward pass over trees that reads nothing but buffers at fixed addresses, so that it can be recorded.

The model stays unmodified: it sees a cache, masks and positions as ever. Its pass is padded to a bucket of columns
and reads the cache at its whole capacity; who sees whom, where each token goes and how much is kept come from device
memory. Letters: B rows, n columns, A slots of the area behind the kept ones, W = A / 64 words of bits, C slots of the
cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.engine.cache import RaggedCache
from specdec.engine.hidden_states import HiddenStateHooks, HiddenStates
from specdec.engine.masks import MaskStyle, TreePass
from specdec.engine.passes import RowPass
from specdec.interfaces import Scores
from specdec.kernels.attention import TreeMask
from specdec.kernels.dispatch import choose
from specdec.tree import TokenTree

WORD = 64  # slots of the area in a word of bits; areas are multiples


@dataclass(frozen=True, slots=True)
class PassShape:
    """What a recording is for; everything else may differ from replay to replay."""

    first_line: int
    num_rows: int
    num_columns: int
    area: int
    capacity: int
    hidden: bool
    layers: tuple[int, ...]


class StepInputs:
    """The buffers of one shape: filled on the host (pinned memory for a GPU) and brought to the device in one copy."""

    def __init__(self, shape: PassShape, device: torch.device) -> None:
        rows, columns, area = shape.num_rows, shape.num_columns, shape.area
        wide: dict[str, tuple[int, ...]] = dict.fromkeys(("ids", "positions", "slots"), (rows, columns))
        wide["bits"] = (rows, columns, area // WORD)
        narrow: dict[str, tuple[int, ...]] = {
            "lengths": (rows,),
            "query_depths": (rows, columns),
            "node_depths": (rows, area),
        }
        num_wide, num_narrow = (sum(int(np.prod(size)) for size in sizes.values()) for sizes in (wide, narrow))
        num_words = num_wide + (num_narrow + 1) // 2
        self._host = torch.zeros(num_words, dtype=torch.long, pin_memory=device.type == "cuda")
        self._device = torch.zeros(num_words, dtype=torch.long, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        views = [_views(buffer, wide, num_wide, narrow) for buffer in (self._host, self._device)]
        self._fields: dict[str, NDArray[Any]] = {name: view.numpy() for name, view in views[0].items()}
        on_device = views[1]
        self.ids, self.positions, self.slots = (on_device[name] for name in ("ids", "positions", "slots"))  # (B, n)
        self.mask = TreeMask(
            on_device["lengths"], on_device["bits"], area, on_device["query_depths"], on_device["node_depths"]
        )
        self.cache_rows = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self._pages = self.cache_rows.int()
        self._places = torch.arange(max(shape.capacity, WORD), device=device)
        self._capacity = shape.capacity

    def load(self, row_passes: Sequence[RowPass]) -> None:
        """Bring a step's trees to the device."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy before this one may still be reading
        for row, row_pass in enumerate(row_passes):
            self._fill(row, row_pass)
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _fill(self, row: int, row_pass: RowPass) -> None:
        fields, new, kept, num_pending = (
            self._fields,
            row_pass.new_tokens,
            row_pass.cache_row.length,
            len(row_pass.pending),
        )
        tree = tree_of(row_pass)
        num_columns, area = fields["ids"].shape[1], fields["node_depths"].shape[1]
        depths = np.concatenate([np.arange(num_pending), num_pending + np.array(tree.depths())])  # of the area
        columns = slice(row_pass.start - kept, row_pass.start - kept + len(new))  # those slots of the area are new
        seen = np.zeros((num_columns, area), dtype=np.bool_)
        seen[:, 0] = True  # padding columns, too, need something to sum
        inside = np.tril(np.ones((len(depths), len(depths)), dtype=np.bool_))
        inside[num_pending:, num_pending:] = tree.ancestors()
        seen[: len(new), : len(depths)] = inside[columns]
        fields["ids"][row] = _padded(new, num_columns)
        fields["query_depths"][row] = _padded(depths[columns], num_columns)
        fields["node_depths"][row] = _padded(depths, area)
        fields["positions"][row] = kept + fields["query_depths"][row]
        # Padding goes behind the tree, where nobody looks.
        fields["slots"][row] = row_pass.start + np.arange(num_columns)
        fields["bits"][row] = np.packbits(seen, axis=-1, bitorder="little").view(np.int64)
        fields["lengths"][row] = kept

    def masks(self, style: MaskStyle) -> Tensor | dict[str, Tensor]:
        """What ``style`` builds on the host, here from the buffers: recorded work."""
        lengths, places = self.mask.lengths.long()[:, None], self._places[: self._capacity]
        area = lengths + self._places[: self.mask.area]  # (B, A) slots
        seen = ((self.mask.bits[..., None] >> self._places[:WORD]) & 1).bool().flatten(2)  # (B, n, A)
        num_columns = seen.shape[1]
        visible = (places < lengths)[:, None].repeat(1, num_columns, 1)
        visible.scatter_(2, area[:, None].expand(-1, num_columns, -1), seen)

        def slot_positions() -> Tensor:
            assert self.mask.node_depths is not None
            return places.repeat(len(lengths), 1).scatter_(1, area, lengths + self.mask.node_depths)

        masks = style.by_kind(visible, slot_positions, self.positions)
        if style.for_kernels and choose("tree_attention", visible.device) is not None:
            for kind, window in style.kernel_windows.items():
                if kind in masks:
                    masks[kind].tree_pass = TreePass(self.mask, self._pages, window)  # type: ignore[attr-defined]
        return style.arranged(masks)


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Some lines of a layer's buffers for a recorded pass: writes where ``slots`` say and reads the whole capacity."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, buffers: tuple[Tensor, Tensor] | None, cache_rows: Tensor, slots: Tensor) -> None:
        super().__init__()
        self._buffers, self._cache_rows, self._slots = buffers, cache_rows, slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' (B, G, n, D) and return all keys and values (B, G, C, D) of these lines."""
        if self._buffers is None:
            raise NotRecordableError("it fills a layer of the cache that the passes before did not")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[self._cache_rows, :, self._slots] = states.transpose(1, 2)
        return self._buffers

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotRecordableError("its code asks how much the cache holds")

    def get_seq_length(self) -> int:
        raise NotRecordableError("its code asks how much the cache holds")

    def get_max_length(self) -> int:
        return -1


class NotRecordableError(RuntimeError):
    """A pass depends on a number that a recording would hold for ever."""


@dataclass(frozen=True, slots=True)
class PassOutput:
    """Of all columns of a pass, real ones first."""

    logits: Tensor  # (B, n, V)
    seen: HiddenStates

    def scores(self, row_passes: Sequence[RowPass]) -> list[Scores]:
        """Each row's share, copied: the next replay overwrites what this one returned."""
        num_columns = max(len(row_pass.new_tokens) for row_pass in row_passes)
        logits, hidden, features = (
            None if t is None else t[:, :num_columns].clone()
            for t in (self.logits, self.seen.hidden, self.seen.features)
        )
        assert logits is not None
        shares = []
        for row, row_pass in enumerate(row_passes):
            num_new, num_nodes = len(row_pass.new_tokens), len(tree_of(row_pass)) - row_pass.num_scored
            states = (None if t is None else t[row, :num_new] for t in (hidden, features))
            shares.append(Scores(logits[row, num_new - num_nodes : num_new], *states))
        return shares


def recordable(
    model: Any, style: MaskStyle, shape: PassShape, inputs: StepInputs, cache: RaggedCache, capture: HiddenStateHooks
) -> Callable[[], PassOutput]:
    """One forward pass that depends on nothing but ``inputs``, ``cache`` and the weights."""
    cache_rows = slice(shape.first_line, shape.first_line + shape.num_rows)
    layers = [
        StaticLayer((pair[0][cache_rows], pair[1][cache_rows]) if pair else None, inputs.cache_rows, inputs.slots)
        for pair in cache.pairs
    ]
    past = Cache(layers=layers)

    @torch.no_grad()
    def run() -> PassOutput:
        with capture:
            logits = model(
                input_ids=inputs.ids,
                position_ids=inputs.positions,
                attention_mask=inputs.masks(style),
                past_key_values=past,
                use_cache=True,
            ).logits
            return PassOutput(logits, capture.take(shape.num_columns))

    return run


def tree_of(row_pass: RowPass) -> TokenTree:
    """The tree of a part that has one."""
    assert row_pass.tree is not None
    return row_pass.tree


def _padded(values: Any, size: int) -> NDArray[np.int64]:
    out = np.zeros(size, dtype=np.int64)
    out[: len(values)] = values
    return out


def _views(
    buffer: Tensor, wide: dict[str, tuple[int, ...]], num_wide: int, narrow: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Parts of a buffer of 64-bit words: ``wide`` ones first, then those of 32 bits."""
    found = {}
    for words, sizes in ((buffer[:num_wide], wide), (buffer[num_wide:].view(torch.int32), narrow)):
        start = 0
        for name, size in sizes.items():
            end = start + int(np.prod(size))
            found[name] = words[start:end].view(size)
            start = end
    return found
