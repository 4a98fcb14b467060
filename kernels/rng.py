"""The random stream of the kernels in torch: Philox4x32-10 keyed by seed, row and position, without host reads.

The same numbers as specdec's noise everywhere else; here whole batches of keys are tensors. Letters: R rows, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TARGET, COIN, RESIDUAL = 0, 2, 3  # streams: the target's own choice, accept or reject, what follows rejections
_LOW = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RngKeys:
    """What noise is tied to; everything lies on the device, so that a captured graph can be replayed."""

    seed: Tensor  # (1,) int64, the bits of an unsigned number
    rows: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64 absolute position of the token that is decided


def philox(counter: tuple[Tensor | int, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """The four words of each block, int64 in [0, 2**32); the parts of ``counter`` broadcast."""
    a, b, c, d = (torch.as_tensor(part, device=seed.device) & _LOW for part in counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # Products wrap around, which keeps all 64 bits right; the mask undoes the sign of the shift.
        p0, p1 = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (p1 >> 32) & _LOW ^ b ^ k0, p1 & _LOW, (p0 >> 32) & _LOW ^ d ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return a, b, c, d


def target_gumbel(keys: RngKeys, vocab: int) -> Tensor:
    """The Gumbel noise (R, V) in float64 of the target's own choices."""
    blocks = torch.arange((vocab + 3) // 4, device=keys.seed.device)
    words = philox((blocks, keys.positions[:, None], TARGET << 28, keys.rows[:, None]), keys.seed)
    uniform = (torch.stack(words, -1).flatten(1)[:, :vocab].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def step_words(keys: RngKeys, row: int, stream: int, depth: int, index: int) -> tuple[int, ...]:
    """The first four words of row number ``row`` for something that belongs to one step."""
    detail = stream << 28 | depth << 16 | index
    words = philox((0, keys.positions[row : row + 1], detail, keys.rows[row : row + 1]), keys.seed)
    return tuple(int(word) for word in words)
