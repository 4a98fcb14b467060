"""A reduced draft vocabulary: the token ids that a target uses most, and what share of its choices they cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters.training.features import FeatureStore


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """Target ids in rising order, and the share of held-out positions whose most probable token is among them."""

    ids: Tensor  # (Vd,)
    coverage: float


def choose_vocabulary(
    store: FeatureStore,
    train: Sequence[int],
    held_out: Sequence[int],
    vocab_size: int,
    size: int,
    known: Tensor | None = None,
) -> DraftVocabulary:
    """The ``size`` ids with the most probability mass under the target's choices on ``train`` shards.

    Among ids that were never seen the lower ones are taken: tokenizers number common tokens first. ``known`` ids
    (Vd,), if they are ``size`` many, are taken as they are.

    Raises:
        ValueError: ``size`` is not in [1, vocab_size].
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(f"a draft vocabulary must have 1 to {vocab_size} (the target's) ids, got {size}")
    ids = _most_used(store, train, vocab_size, size) if known is None or len(known) != size else known
    kept = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    best = torch.cat([text.top_ids[:, 0] for shard in held_out for text in store.read(shard)])
    return DraftVocabulary(ids, float(kept[best].double().mean()))


def _most_used(store: FeatureStore, shards: Sequence[int], vocab_size: int, size: int) -> Tensor:
    mass = torch.zeros(vocab_size, dtype=torch.float64)
    for shard in shards:
        for text in store.read(shard):
            mass.index_add_(0, text.top_ids.flatten(), text.top_logprobs.flatten().double().exp())
    mass -= torch.arange(vocab_size, dtype=torch.float64) * 1e-12
    return mass.topk(size).indices.sort().values
