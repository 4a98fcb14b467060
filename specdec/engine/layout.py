"""What an engine asks of the place where its rows' keys and values are, and of one pass over them.

Two keep that promise: ragged lines with padded passes, and pages with passes in which rows stand one behind the other.
Letters: B rows, T columns, p pending tokens, n new nodes of a row, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from specdec.engine.hidden_states import HiddenStates
from specdec.engine.masks import MaskStyle
from specdec.engine.passes import CacheRow, RowPass
from specdec.interfaces import Row, Scores


class Layout(Protocol):
    """One forward pass: which columns it has, and whose they are."""

    @property
    def ids(self) -> Tensor:
        """Token ids as the model takes them, (B, T) or (1, T)."""

    @property
    def positions(self) -> Tensor:
        """Of the shape of ``ids``."""

    @property
    def num_columns(self) -> int:
        """T."""

    def mask(self, style: MaskStyle) -> Tensor | dict[str, Tensor] | None:
        """What a model takes as ``attention_mask``; None: its own causal mask is right."""

    def attending(self) -> AbstractContextManager[None]:
        """Around the model's forward: what its attention needs beside the mask."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a network of ours, with the keys and values that ``KVRows.layer(i).update`` returned."""

    def kept(self, must_be_index: bool) -> int | Tensor | None:
        """The columns whose logits are needed, as ``logits_to_keep``: how many at the end, or which; None: all."""

    def scores(self, logits: Tensor, seen: HiddenStates) -> list[Scores]:
        """Each row's share of ``logits`` (..., kept columns, V)."""

    def placed(self, states: Sequence[Tensor]) -> Tensor:
        """(..., T, H) from each row's (p + n, H) at its new columns."""

    def at_nodes(self, states: Tensor) -> list[Tensor]:
        """Of ``states`` (..., T, H) each row's (n, H) at its new nodes."""


RowT = TypeVar("RowT", bound=CacheRow)


class OpenRows(Generic[RowT]):
    """The rows that are open in a cache: what every ``KVRows`` has in common."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self._cache_rows: dict[Row, RowT] = {}

    def __getitem__(self, row: Row) -> RowT:
        return self._cache_rows[row]

    def __contains__(self, row: Row) -> bool:
        return row in self._cache_rows

    def __len__(self) -> int:
        return len(self._cache_rows)

    @property
    def past_key_values(self) -> Any:
        """The cache as a transformers model takes it."""
        return self.cache.past_key_values

    def layer(self, index: int) -> Any:
        """The cache of one layer, with ``update`` as in transformers."""
        return self.cache.layers[index]


class KVRows(Protocol):
    """Rows, and where their keys and values are."""

    @property
    def past_key_values(self) -> Any:
        """The cache as a transformers model takes it."""

    def layer(self, index: int) -> Any:
        """The cache of one layer, with ``update`` as in transformers."""

    def __getitem__(self, row: Row) -> CacheRow: ...

    def __contains__(self, row: Row) -> bool: ...

    def __len__(self) -> int: ...

    def open(self, rows: Sequence[Row]) -> None:
        """Make room for ``rows``, for all of them or none."""

    def close(self, rows: Sequence[Row]) -> None:
        """Free what ``rows`` hold; rows that were never opened are ignored."""

    def groups(self, row_passes: Sequence[RowPass]) -> list[list[int]]:
        """Which parts share a forward pass, and in which order they stand in it."""

    def lay_out(self, row_passes: Sequence[RowPass], device: torch.device) -> Layout:
        """Begin a pass over parts of one group."""

    def keep(self, kept: Sequence[tuple[CacheRow, list[int]]]) -> None:
        """Make the slots of these nodes (ascending, root first) the next ones of their rows, and drop all others."""
