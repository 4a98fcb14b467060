"""A pass over rows one behind the other: no padding between them, and each row's attention reads its own slots alone.

The model sees one line of all rows' new tokens. Its attention (``specdec.engine.attention``) is handed the whole
buffer of a layer and finds here which slots each row has and who sees whom. Letters: N columns of all rows, T of one,
A slots behind the kept ones, W slots that a row sees, S slots of the pool, h heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.engine.grouped_attention import grouped_attention
from specdec.engine.hidden_states import HiddenStates
from specdec.engine.masks import FULL, MaskStyle
from specdec.engine.passes import RowPass
from specdec.engine.shared_prefix import SharedAttention, Sharing, can_share, find_sharing
from specdec.interfaces import Scores

_NONE: Mapping[int, Tensor] = MappingProxyType({})
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (1, h, T, D), (1, G, W, D) twice, (1, 1, T, W)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one row's columns see under one kind of mask."""

    slots: slice | Tensor  # of the pool, in the row's order: a stretch, or (W,)
    mask: Tensor | None  # (1, 1, T, W) bool; None: all of it


@dataclass(eq=False)
class FlatRow:
    """One row's part of the line."""

    row_pass: RowPass
    columns: slice
    slots: NDArray[np.int64]  # (W,) of the pool
    device: torch.device

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """(A,) of pending tokens and nodes, counted from the kept slots."""
        tree, num_pending = self.row_pass.tree, len(self.row_pass.pending)
        nodes = np.asarray(tree.depths() if tree else [], dtype=np.int64)
        return np.concatenate([np.arange(num_pending), num_pending + nodes])

    @property
    def num_done(self) -> int:
        """Slots behind the kept ones that an earlier pass filled."""
        return self.row_pass.start - self.row_pass.cache_row.length

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """(T,)."""
        return self.row_pass.cache_row.length + self.depths[self.num_done :]

    def seen(self, kind: str, style: MaskStyle | None) -> Seen:
        """What the columns see where layers are of ``kind``."""
        tree, num_pending, kept = self.row_pass.tree, len(self.row_pass.pending), self.row_pass.cache_row.length
        area = np.tril(np.ones((len(self.depths), len(self.depths)), dtype=np.bool_))
        if tree:
            area[num_pending:, num_pending:] = tree.ancestors()
        visible = np.ones((len(self.positions), len(self.slots)), dtype=np.bool_)
        visible[:, kept:] = area[self.num_done :]
        first = 0
        if kind != FULL and style is not None:
            keys = np.concatenate([np.arange(kept), kept + self.depths])
            visible &= style.within(kind, keys[None], self.positions[:, None])
            first = int(visible.any(0).argmax())
            visible = visible[:, first:]
        slots = self.slots[first:]
        mask = None if visible.all() else torch.from_numpy(visible).to(self.device)[None, None]
        return Seen(as_stretch(slots, self.device), mask)


@dataclass(eq=False)
class FlatPass:
    """The columns of ``row_passes``, one row behind the other; ``slots`` (W,) are those of each row, new ones last."""

    row_passes: Sequence[RowPass]
    slots: Sequence[NDArray[np.int64]]
    device: torch.device
    _style: MaskStyle | None = None
    _markers: dict[str, Tensor] = field(default_factory=dict)
    _seen: dict[str, list[Seen]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[FlatRow]:
        """The parts of the line."""
        ends = np.cumsum([len(row_pass.new_tokens) for row_pass in self.row_passes]).tolist()
        columns = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return [FlatRow(*each, self.device) for each in zip(self.row_passes, columns, self.slots, strict=True)]

    @property
    def num_columns(self) -> int:
        """N."""
        return sum(len(row_pass.new_tokens) for row_pass in self.row_passes)

    @property
    def ids(self) -> Tensor:
        """(1, N) token ids."""
        return torch.tensor([[t for each in self.row_passes for t in each.new_tokens]], device=self.device)

    @property
    def positions(self) -> Tensor:
        """(1, N)."""
        return torch.from_numpy(np.concatenate([row.positions for row in self.rows])).to(self.device)[None]

    @property
    def written(self) -> Tensor:
        """(N,) slots of the pool that the columns fill."""
        filled = [row.slots[row.row_pass.start :] for row in self.rows]
        return torch.from_numpy(np.concatenate(filled)).to(self.device)

    def mask(self, style: MaskStyle) -> Tensor | dict[str, Tensor]:
        """(1, 1, N, 1) each: a marker that tells our attention the kind of a layer's mask, and says nothing else."""
        self._style = style
        self._markers = {
            kind: torch.ones((1, 1, self.num_columns, 1), dtype=torch.bool, device=self.device) for kind in style.kinds
        }
        return style.arranged(self._markers)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """While the model runs in this thread, its attention finds this pass."""
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)

    def kind_of(self, marker: Tensor | None) -> str:
        """Which kind of mask ``marker`` stands for.

        Raises:
            ValueError: none of this pass; the model does not hand on what it is given.
        """
        place = None if marker is None else marker.untyped_storage().data_ptr()  # a view of one is as good
        for kind, known in self._markers.items():
            if known.untyped_storage().data_ptr() == place:
                return kind
        raise ValueError("the model hands another mask to its attention than it was given, so rows cannot share a line")

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(1, h, N, D): attention of a network of ours over whole buffers ``key`` and ``value`` (1, G, S, D)."""
        return self.attend_plainly(query, key, value, FULL, None)

    def attend_plainly(self, query: Tensor, key: Tensor, value: Tensor, kind: str, scaling: float | None) -> Tensor:
        """``attend_with`` of a softmax and nothing else; what rows share is read once."""

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return grouped_attention(q, k, v, mask, scaling)

        parts: dict[int, Tensor] = {}
        for group in self._sharing if kind == FULL and self._sharing and can_share(query) else ():
            shared, *own = ((_picked(key, s), _picked(value, s)) for s in (group.shared_slots, *group.own_slots))
            parts.update(zip(group.sharing.rows, group(query, shared, own, scaling), strict=True))
        return self.attend_with(attend, query, key, value, kind, parts)

    def attend_with(
        self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, kind: str, known: Mapping[int, Tensor] = _NONE
    ) -> Tensor:
        """(1, h, N, D): each row's ``query`` (1, h, T, D) over what it sees of whole buffers (1, G, S, D).

        Rows whose part (1, h, T, D) is ``known`` already are left out.
        """
        parts = [
            known[i]
            if i in known
            else attend(query[:, :, row.columns], _picked(key, seen.slots), _picked(value, seen.slots), seen.mask)
            for i, (row, seen) in enumerate(zip(self.rows, self._seen_by_rows(kind), strict=True))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _seen_by_rows(self, kind: str) -> list[Seen]:
        if kind not in self._seen:
            self._seen[kind] = [row.seen(kind, self._style) for row in self.rows]
        return self._seen[kind]

    @cached_property
    def _sharing(self) -> list[SharedAttention]:
        """The groups of rows that begin with the same slots."""
        kept = [row_pass.cache_row.length for row_pass in self.row_passes]
        return [self._shared_attention(sharing) for sharing in find_sharing(self.slots, kept)]

    def _shared_attention(self, sharing: Sharing) -> SharedAttention:
        seen = self._seen_by_rows(FULL)
        first, *_ = slots = [self.slots[row] for row in sharing.rows]
        return SharedAttention(
            sharing,
            [self.rows[row].columns for row in sharing.rows],
            [seen[row].mask for row in sharing.rows],
            as_stretch(first[: sharing.length], self.device),
            [as_stretch(each[sharing.length :], self.device) for each in slots],
        )

    @cached_property
    def _node_columns(self) -> list[slice]:
        return [slice(row.columns.stop - row.row_pass.num_new_nodes, row.columns.stop) for row in self.rows]

    def kept(self, must_be_index: bool) -> int | Tensor | None:
        """The columns of nodes, as ``logits_to_keep``; None: all columns are."""
        columns = [i for nodes in self._node_columns for i in range(nodes.start, nodes.stop)]
        if len(columns) == self.num_columns:
            return None
        return torch.tensor(columns or [self.num_columns - 1], device=self.device)

    def scores(self, logits: Tensor, seen: HiddenStates) -> list[Scores]:
        """Each row's share of ``logits`` (1, kept or all columns, V)."""
        nodes = self._node_columns
        if logits.shape[1] != self.num_columns:  # kept ones only
            ends = np.cumsum([each.stop - each.start for each in nodes]).tolist()
            nodes = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return [
            Scores(logits[0, each], *(None if t is None else t[0, row.columns] for t in (seen.hidden, seen.features)))
            for row, each in zip(self.rows, nodes, strict=True)
        ]

    def placed(self, states: Sequence[Tensor]) -> Tensor:
        """(1, N, H) from each row's (p + n, H) at its new columns."""
        return torch.cat(list(states))[None]

    def at_nodes(self, states: Tensor) -> list[Tensor]:
        """Of ``states`` (1, N, H) each row's (n, H) at its new nodes."""
        return [states[0, each] for each in self._node_columns]


def as_stretch(slots: NDArray[np.int64], device: torch.device) -> slice | Tensor:
    """``slots`` of the pool as a slice where they lie side by side, else as an index."""
    is_stretch = int(slots[-1] - slots[0]) == len(slots) - 1 and bool((np.diff(slots) == 1).all())
    return slice(int(slots[0]), int(slots[-1]) + 1) if is_stretch else torch.from_numpy(slots).to(device)


def running_pass() -> FlatPass | None:
    """The pass that runs in this thread, if rows stand one behind the other in it."""
    return _RUNNING.get()


_RUNNING: ContextVar[FlatPass | None] = ContextVar("flat_pass", default=None)


def _picked(buffer: Tensor, slots: slice | Tensor) -> Tensor:
    return buffer[:, :, slots] if isinstance(slots, slice) else buffer.index_select(2, slots)
