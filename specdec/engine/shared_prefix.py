"""Attention of rows that begin with the same slots: one look at these for all of them, merged with what each has alone.

Keys that rows share are read once instead of once for each row (Juravsky et al., 2024, "Hydragen"). The two parts of a
softmax are put together by their log-sum-exps. Letters: T columns of a row, N of all rows of a group, h heads, G
key-value heads, P shared slots, W slots that a row sees beyond, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_SHARED = 128  # slots from which a second product pays


@dataclass(frozen=True, slots=True)
class Sharing:
    """Rows of a pass (their numbers) that begin with the same ``length`` slots."""

    rows: tuple[int, ...]
    length: int  # P


def find_sharing(slots: Sequence[NDArray[np.int64]], kept: Sequence[int]) -> list[Sharing]:
    """Which rows see the same first slots; ``kept`` (rows,) says up to where every column of a row sees all."""
    by_first: dict[int, list[int]] = {}
    for row, places in enumerate(slots):
        if kept[row] >= MIN_SHARED:
            by_first.setdefault(int(places[0]), []).append(row)
    found = []
    for rows in by_first.values():
        if len(rows) > 1:
            length = min(kept[row] for row in rows)
            first = slots[rows[0]][:length]
            for row in rows[1:]:
                differs = np.flatnonzero(slots[row][:length] != first)
                length = min(length, int(differs[0])) if len(differs) else length
                first = first[:length]
            if length >= MIN_SHARED:
                found.append(Sharing(tuple(rows), length))
    return found


def can_share(query: Tensor) -> bool:
    """Whether PyTorch's attention tells its log-sum-exps here. The operator is private to it, so it is tried once."""
    if query.device.type != "cpu":
        return False
    key = query.dtype, query.shape[-1]
    if key not in _TRIED:
        _TRIED[key] = _is_right(*key)
    return _TRIED[key]


_TRIED: dict[tuple[torch.dtype, int], bool] = {}  # of the operator, not of any model


@dataclass(slots=True)
class SharedAttention:
    """One group's attention in all layers of a pass; ``masks`` (1, 1, T, P + W) of its rows, None: all is seen."""

    sharing: Sharing
    columns: Sequence[slice]
    masks: Sequence[Tensor | None]
    shared_slots: slice | Tensor  # of the pool, (P,)
    own_slots: Sequence[slice | Tensor]  # (W,) of each row
    _own_masks: dict[int, Tensor | None] = field(default_factory=dict)

    def __call__(
        self, query: Tensor, shared: tuple[Tensor, Tensor], own: Sequence[tuple[Tensor, Tensor]], scaling: float | None
    ) -> list[Tensor]:
        """(1, h, T, D) of each row, from ``query`` (1, h, N', D) of the whole line, ``shared`` keys and values
        (1, G, P, D) and each row's ``own`` (1, G, W, D)."""
        heads, groups = query.shape[1], shared[0].shape[1]
        parts = [_as_block(query[:, :, columns], groups) for columns in self.columns]
        common, common_lse = _attend(torch.cat(parts, 2), *shared, None, scaling)
        sizes = [part.shape[2] for part in parts]
        outs = []
        splits = zip(parts, own, torch.split(common, sizes, 2), torch.split(common_lse, sizes, 2), strict=True)
        for row, (part, (key, value), out, lse) in enumerate(splits):
            own_out, own_lse = _attend(part, key, value, self._own_mask(row, heads // groups, part.dtype), scaling)
            weight = torch.sigmoid(lse - own_lse)[..., None]
            merged = torch.lerp(own_out.float(), out.float(), weight).to(part.dtype)
            outs.append(merged.reshape(1, heads, -1, value.shape[-1]))
        return outs

    def _own_mask(self, row: int, repeats: int, dtype: torch.dtype) -> Tensor | None:
        if row not in self._own_masks:
            mask = self.masks[row]
            if mask is not None:
                own = mask[..., self.sharing.length :]
                mask = torch.zeros(own.shape, dtype=dtype).masked_fill_(~own, -torch.inf).repeat(1, 1, repeats, 1)
            self._own_masks[row] = mask
        return self._own_masks[row]


def _as_block(query: Tensor, groups: int) -> Tensor:
    """(1, G, h / G T, D): the heads that share keys, as rows of one block."""
    return query.reshape(1, groups, -1, query.shape[-1])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Output (1, G, T, D) and log-sum-exps (1, G, T) in float32."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scaling
    )
    return out, lse.float()


def _is_right(dtype: torch.dtype, size: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, size, generator=generator).to(dtype) for _ in range(3))
    mask = torch.zeros(1, 1, 5, 5, dtype=dtype)
    mask[..., :2, 3:] = -torch.inf
    try:
        out, lse = _attend(query, key, value, mask, 0.3)
    except (AttributeError, RuntimeError, TypeError):
        return False
    scores = query.double() @ key.double().transpose(2, 3) * 0.3 + mask.double()
    expected, tolerance = scores.softmax(-1) @ value.double(), 1e-4 if dtype == torch.float32 else 5e-2
    close = torch.allclose(lse.double(), scores.logsumexp(-1), atol=tolerance, rtol=tolerance)
    return close and torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)
