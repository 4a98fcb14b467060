"""The mapping between a head's draft vocabulary and its target's: d2t holds offsets, t2d says which ids are drafted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from specdec.drafters.heads.checkpoint_io import check_vocab
from specdec.errors import CheckpointError


def complete_mapping(tensors: dict[str, Tensor], draft_vocab_size: int, vocab_size: int, needs_t2d: bool) -> bool:
    """Add to ``tensors`` what a checkpoint may leave out: the mapping of a whole vocabulary, or what d2t implies.

    Returns whether t2d was made from d2t.
    """
    if "t2d" in tensors:
        return False
    if "d2t" not in tensors and draft_vocab_size == vocab_size:
        tensors["d2t"] = torch.zeros(vocab_size, dtype=torch.long)
        needs_t2d = False
    d2t = tensors.get("d2t")
    if needs_t2d or d2t is None or not _is_whole(d2t):
        return False
    ids = d2t.long() + torch.arange(d2t.numel()).view(d2t.shape)
    inside = ids[(ids >= 0) & (ids < vocab_size)]
    tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, inside, True)
    return True


def check_mapping(d2t: Tensor, t2d: Tensor, path: Path, is_made: bool) -> None:
    """Check that ``d2t`` (Vd,) are offsets, target id - draft id, and lead to the ids that ``t2d`` (V,) holds.

    Where ``t2d`` was made from ``d2t`` (``is_made``), only the values can tell: offsets do not rise at every step.

    Raises:
        CheckpointError: other types or values, or the two contradict each other.
    """
    what = f"d2t (target id - draft id) in {path}"
    if not _is_whole(d2t):
        raise CheckpointError(f"{what} must be whole numbers, got {d2t.dtype}")
    if t2d.dtype is not torch.bool and not bool(((t2d == 0) | (t2d == 1)).all()):
        raise CheckpointError(
            f"t2d in {path} must say of each target id whether it is drafted, 0 or 1, got {t2d.min()} to {t2d.max()}"
        )
    offsets, held = d2t.long(), t2d.bool()
    places = held.nonzero().flatten()
    ids = offsets + torch.arange(len(offsets))
    rises = len(ids) > 1 and bool((offsets[1:] > offsets[:-1]).all())
    if rises and (is_made or (torch.equal(places, offsets) and not torch.equal(places, ids))):
        raise CheckpointError(f"{what} must be offsets, got what looks like the target ids: subtract each one's place")
    check_vocab(ids, len(held), what)
    wrong = (torch.zeros_like(held).index_fill_(0, ids, True) != held).nonzero().flatten()
    if len(wrong):
        raise CheckpointError(
            f"d2t and t2d in {path} disagree on {len(wrong)} token ids, such as {int(wrong[0])}: the draft's tokens are unknown"
        )


def _is_whole(tensor: Tensor) -> bool:
    return tensor.dtype is not torch.bool and not tensor.is_floating_point() and not tensor.is_complex()
