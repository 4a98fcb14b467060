"""How rows share a forward pass: their lines in a cache, the columns of a pass, and who sees whom.

Knows no model. Columns of a pass are aligned at the right, so that the last ones are the trees'; slots of a line are
aligned at the left, without holes. Letters: B rows, T columns, n nodes, p pending tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specdec.engine.cache import RaggedCache
from specdec.engine.masks import MaskPlan
from specdec.interfaces import Row
from specdec.tree import TokenTree

PASS_COLUMNS = 128  # padded columns that are worth a pass of their own to avoid


@dataclass(slots=True)
class CacheRow:
    """A row's place in the cache."""

    index: int  # buffer row
    length: int = 0  # slots that hold kept tokens
    nodes: list[int] = field(default_factory=list)  # of the tree just scored: behind which slot each node stands


@dataclass(frozen=True, slots=True)
class RowPass:
    """One row's share of a pass."""

    cache_row: CacheRow
    pending: list[int]  # (p,)
    tree: TokenTree | None  # None while a long prompt is processed
    num_scored: int  # nodes that an earlier pass scored

    @property
    def new_tokens(self) -> list[int]:
        return self.pending + list(self.tree.tokens[self.num_scored :]) if self.tree else self.pending

    @property
    def base(self) -> int:
        """The slot of the root."""
        return self.cache_row.length + len(self.pending)

    @property
    def start(self) -> int:
        """The slot of the first new token."""
        return self.cache_row.length + self.num_scored


class CacheRows:
    """Which row owns which line of a cache; lines in use stay together."""

    def __init__(self) -> None:
        self._cache_rows: dict[Row, CacheRow] = {}
        self._by_index: list[Row] = []

    def __getitem__(self, row: Row) -> CacheRow:
        return self._cache_rows[row]

    def __contains__(self, row: Row) -> bool:
        return row in self._cache_rows

    def __len__(self) -> int:
        return len(self._cache_rows)

    def open(self, rows: Sequence[Row], cache: RaggedCache) -> None:
        """Give each row a line behind those in use."""
        cache.reserve_rows(len(self._by_index) + len(rows))  # if there is no room, no row is open
        for row in rows:
            self._cache_rows[row] = CacheRow(len(self._by_index))
            self._by_index.append(row)

    def close(self, rows: Sequence[Row], cache: RaggedCache) -> None:
        """Forget ``rows``; the last line moves into each gap."""
        for row in rows:
            hole = self._cache_rows.pop(row).index
            last = self._by_index.pop()
            if last is not row:
                cache_row = self._cache_rows[last]
                cache.move_row(cache_row.index, hole, cache_row.length)
                cache_row.index = hole
                self._by_index[hole] = last

    def groups(self, row_passes: Sequence[RowPass]) -> list[list[int]]:
        """Which parts share a forward pass, each in the order of the cache's lines."""
        order = in_order(row_passes)
        runs = grouped([row_passes[i].cache_row.index for i in order], [len(row_passes[i].new_tokens) for i in order])
        return [order[run] for run in runs]


def in_order(row_passes: Sequence[RowPass]) -> list[int]:
    """The parts in the order of the cache's lines."""
    return sorted(range(len(row_passes)), key=lambda i: row_passes[i].cache_row.index)


def in_lockstep(row_passes: Sequence[RowPass]) -> bool:
    """Whether a causal mask is right for all: chains of one length that start at one slot."""
    first = row_passes[0]
    size = len(first.new_tokens)
    return all(
        row_pass.start == first.start
        and len(row_pass.new_tokens) == size
        and (row_pass.tree is None or row_pass.tree.is_chain)
        for row_pass in row_passes
    )


def grouped(cache_rows: Sequence[int], sizes: Sequence[int]) -> list[slice]:
    """Which of neighbouring parts share a pass: those with the least padded columns in all, each pass counting too.

    A pass reads a run of neighbouring ``lines`` as one slice and is as wide as the largest of its ``sizes``. Without
    this, one row that joins with its prompt would make every row of the batch as wide as that prompt.
    """
    if len(set(sizes)) <= 1 and cache_rows[-1] - cache_rows[0] == len(cache_rows) - 1:
        return [slice(0, len(cache_rows))]
    best, cuts = [0], [0]  # of the first i parts: the least columns, and where the last group starts
    for end in range(1, len(cache_rows) + 1):
        widest, least, cut = 0, float("inf"), end - 1
        for first in range(end - 1, -1, -1):
            if cache_rows[first] + end - 1 - first != cache_rows[end - 1]:
                break
            widest = max(widest, sizes[first])
            columns = best[first] + widest * (end - first) + PASS_COLUMNS
            if columns < least:
                least, cut = columns, first
        best.append(int(least))
        cuts.append(cut)
    runs, end = [], len(cache_rows)
    while end:
        runs.append(slice(cuts[end], end))
        end = cuts[end]
    return runs[::-1]


def pass_slots(row_passes: Sequence[RowPass], num_columns: int) -> Tensor:
    """(B, T) slots of the columns: real ones from the row's start on, padding behind them where nothing is kept."""
    columns = torch.arange(num_columns)
    starts = torch.tensor([row_pass.start for row_pass in row_passes])[:, None]
    padding = torch.tensor([num_columns - len(row_pass.new_tokens) for row_pass in row_passes])[:, None]
    return starts + (columns - padding) % num_columns


def mask_plan(row_passes: Sequence[RowPass], num_columns: int, width: int, device: torch.device) -> MaskPlan:
    limits, positions, blocks, depths = [], [], [], []
    for row_pass in row_passes:
        length, base = row_pass.cache_row.length, row_pass.base
        pad = num_columns - len(row_pass.new_tokens)
        node_depths = row_pass.tree.depths() if row_pass.tree else []
        new_depths = node_depths[row_pass.num_scored :]
        pending = range(length, base)
        # A padding column sees slot 0, so that its softmax has something to sum.
        limits.append([1] * pad + [slot + 1 for slot in pending] + [base] * len(new_depths))
        positions.append([0] * pad + list(pending) + [base + d for d in new_depths])
        block = np.zeros((num_columns, len(node_depths)), dtype=np.bool_)
        if row_pass.tree:
            block[num_columns - len(new_depths) :] = row_pass.tree.ancestors()[row_pass.num_scored :]
        blocks.append(torch.from_numpy(block).to(device))
        depths.append(node_depths)
    return MaskPlan(
        torch.tensor(limits, device=device),
        torch.tensor(positions, device=device),
        tuple(row_pass.base for row_pass in row_passes),
        tuple(blocks),
        tuple(depths),
        width,
        tuple(row_pass.cache_row.length for row_pass in row_passes),
    )
