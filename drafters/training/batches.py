"""Batches of padded texts from a store of features. Letters: B texts, T positions, H, F, K as in features.py."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafters.training.features import FeatureStore, Text
from specdec.drafters.training.outcome import Batch, Batches

MIN_LENGTH = 8  # shorter texts teach nothing


@dataclass(frozen=True, slots=True)
class Split:
    """Which shards are learned from, and which are held out."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, num_shards: int, share: float = 0.04) -> Split:
        """The last shards are held out: at least one.

        Raises:
            ValueError: fewer than two shards.
        """
        if num_shards < 2:
            raise ValueError(
                f"training needs two shards of data, one of them held out, got {num_shards}; generate more conversations"
            )
        first = num_shards - max(1, round(share * num_shards))
        return cls(tuple(range(first)), tuple(range(first, num_shards)))


def text_batches(store: FeatureStore, shards: Sequence[int], batch_tokens: int, seed: int | None) -> Batches:
    """Batches of at most ``batch_tokens`` padded tokens; with ``seed`` None always in the same order."""
    sizes = {shard: store.sizes(shard) for shard in shards}

    def epoch(number: int) -> Iterator[Batch]:
        order = list(shards)
        shuffler = None if seed is None else random.Random(seed * 1_000_003 + number)
        if shuffler is not None:
            shuffler.shuffle(order)
        for shard in order:
            groups = _groups(sizes[shard], batch_tokens)
            if shuffler is not None:
                shuffler.shuffle(groups)
            texts = store.read(shard)
            for group in groups:
                yield padded([texts[i] for i in group])

    return Batches(sum(len(_groups(sizes[shard], batch_tokens)) for shard in shards), epoch)


def _groups(sizes: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Texts of like length together, longest first."""
    order = sorted((i for i, size in enumerate(sizes) if size >= MIN_LENGTH), key=lambda i: -sizes[i])
    groups = []
    while order:
        count = max(1, batch_tokens // sizes[order[0]])
        groups.append(order[:count])
        order = order[count:]
    return groups


def padded(texts: Sequence[Text]) -> Batch:
    """tokens (B, T), lengths (B,), hidden (B, T, H), features (B, T, F), top_ids and top_logprobs (B, T, K)."""

    def stack(columns: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(columns), batch_first=True)

    return {
        "tokens": stack([text.tokens for text in texts]),
        "lengths": torch.tensor([len(text.tokens) for text in texts]),
        "hidden": stack([text.hidden for text in texts]),
        "features": stack([text.features for text in texts]),
        "top_ids": stack([text.top_ids for text in texts]),
        "top_logprobs": stack([text.top_logprobs for text in texts]),
    }
