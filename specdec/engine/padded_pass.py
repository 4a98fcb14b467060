"""A pass over rows side by side: columns aligned at the right, so that the last ones are the trees'.

Letters: B rows, T columns, n nodes, p pending tokens, W slots, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from specdec.engine.grouped_attention import grouped_attention
from specdec.engine.hidden_states import HiddenStates
from specdec.engine.masks import MaskPlan, MaskStyle, visibility
from specdec.engine.passes import RowPass, in_lockstep, mask_plan
from specdec.interfaces import Scores


@dataclass(frozen=True)
class PaddedPass:
    """The columns of ``row_passes``, which stand in neighbouring lines of a cache, in the cache's order."""

    row_passes: Sequence[RowPass]
    device: torch.device
    pages: Tensor | None = None  # (B, any) int32 blocks of each row, for a kernel that reads them

    @cached_property
    def columns(self) -> list[list[int]]:
        """The new tokens of each row."""
        return [row_pass.new_tokens for row_pass in self.row_passes]

    @cached_property
    def num_columns(self) -> int:
        """T."""
        return max(map(len, self.columns))

    @cached_property
    def start(self) -> int:
        """Slots in use before the pass: the longest row's."""
        return max(row_pass.start for row_pass in self.row_passes)

    @property
    def width(self) -> int:
        """W, the slots that are read."""
        return self.start + self.num_columns

    @cached_property
    def is_plain(self) -> bool:
        """Whether a causal mask is right for all rows."""
        return in_lockstep(self.row_passes)

    def slots(self) -> Tensor | None:
        """(B, T) where each column's keys go, real ones from the row's start on, padding behind them where nothing is
        kept; None: start, start + 1, ... in every row."""
        if self.is_plain or len(self.row_passes) == 1:  # a row alone fills its slots in order
            return None
        columns = torch.arange(self.num_columns)
        starts = torch.tensor([row_pass.start for row_pass in self.row_passes])[:, None]
        padding = torch.tensor([self.num_columns - len(each) for each in self.columns])[:, None]
        return (starts + (columns - padding) % self.num_columns).to(self.device)

    @cached_property
    def ids(self) -> Tensor:
        """(B, T) token ids."""
        padded = [[0] * (self.num_columns - len(each)) + each for each in self.columns]
        return torch.tensor(padded, device=self.device)

    @cached_property
    def plan(self) -> MaskPlan:
        """Who sees whom."""
        return mask_plan(self.row_passes, self.num_columns, self.width, self.device)

    @property
    def positions(self) -> Tensor:
        """(B, T)."""
        if self.is_plain and self.num_columns == 1:
            return torch.full((len(self.row_passes), 1), self.start, device=self.device)
        return self.plan.positions

    def mask(self, style: MaskStyle) -> Tensor | dict[str, Tensor] | None:
        """What a model takes as ``attention_mask``; None: its own causal mask is right."""
        return None if self.is_plain and self.pages is None else style.build(self.plan, self.pages)

    def attending(self) -> AbstractContextManager[None]:
        """Around the model's forward: the masks say everything."""
        return nullcontext()

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, h, T, D): attention of a network of ours, with ``key`` and ``value`` (B, G, W, D)."""
        sees_all = self.is_plain and self.num_columns == 1
        return grouped_attention(query, key, value, None if sees_all else self._visible)

    @cached_property
    def _visible(self) -> Tensor:
        return visibility(self.plan)[:, None]

    @cached_property
    def num_nodes(self) -> list[int]:
        """New nodes of each row, its last columns."""
        return [row_pass.num_new_nodes for row_pass in self.row_passes]

    def kept(self, must_be_index: bool) -> int | Tensor | None:
        """The columns whose logits are needed, as ``logits_to_keep``: how many at the end, or which; None: all."""
        num_kept = max(1, *self.num_nodes)
        if num_kept == self.num_columns:
            return None
        # Given a number, Gemma 4 drops the other columns in the middle of the model.
        return (
            torch.arange(self.num_columns - num_kept, self.num_columns, device=self.device)
            if must_be_index
            else num_kept
        )

    def scores(self, logits: Tensor, seen: HiddenStates) -> list[Scores]:
        """Each row's share of ``logits`` (B, kept columns, V)."""
        shares = []
        for row, (columns, num_nodes) in enumerate(zip(self.columns, self.num_nodes, strict=True)):
            hidden, features = (
                None if t is None else _last(t[row], len(columns)) for t in (seen.hidden, seen.features)
            )
            shares.append(Scores(_last(logits[row], num_nodes), hidden, features))
        return shares

    def placed(self, states: Sequence[Tensor]) -> Tensor:
        """(B, T, H) from each row's (p + n, H) at its new columns."""
        padding = [self.num_columns - len(each) for each in self.columns]
        return torch.stack(
            [nn.functional.pad(s, (0, 0, pad, 0)) if pad else s for pad, s in zip(padding, states, strict=True)]
        )

    def at_nodes(self, states: Tensor) -> list[Tensor]:
        """Of ``states`` (B, T, H) each row's (n, H) at its new nodes."""
        return [_last(row, count) for row, count in zip(states, self.num_nodes, strict=True)]


def _last(states: Any, count: int) -> Any:
    return states[states.shape[0] - count :]  # [-count:] would be everything for a count of 0
