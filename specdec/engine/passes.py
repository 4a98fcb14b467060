"""What rows bring to a forward pass, which of them share one, and who sees whom. Knows no model and no cache.

Slots count a row's own keys and values: slot = position up to the root, then the nodes in node order. Letters: B rows,
T columns, n nodes, p pending tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from specdec.engine.masks import MaskPlan
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
    def num_new_nodes(self) -> int:
        """n, the nodes that this pass scores."""
        return len(self.tree) - self.num_scored if self.tree else 0

    @property
    def base(self) -> int:
        """The slot of the root."""
        return self.cache_row.length + len(self.pending)

    @property
    def start(self) -> int:
        """The slot of the first new token."""
        return self.cache_row.length + self.num_scored


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
