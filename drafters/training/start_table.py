"""The start table of ``recycling``: what the target expects after the contexts that its own text holds most often.

Nothing is fitted. The target's next-token distributions behind all places of the text where a context stands are
averaged, and what a few places cannot say is left to the context without its oldest token (absolute weight, as in
Dirichlet smoothing; MacKay and Peto, 1995). Contexts of one token are as in Token Recycling (Luo et al., 2024).

Letters: T positions of a shard, K kept tokens of each distribution, c contexts, o tokens of a context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.heads.shipped import target_facts
from specdec.drafters.lookup.start_table import Order, StartTable
from specdec.drafters.lookup.successors import keys_of
from specdec.drafters.training.features import FeatureStore
from specdec.drafters.training.job import Facts, Job
from specdec.drafters.training.outcome import RANKS
from specdec.drafters.training.recipes import TableRecipe

MAX_ORDER = 3  # longer contexts are too rare to add anything
_NUM_SUCCESSORS = 8
_KEPT = 12  # tokens of a distribution that are averaged
_WEIGHT = 1.0  # of what the shorter context says, in places
_MERGE_EVERY = 1 << 23  # pairs that wait to be summed

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def train_table(job: Job, recipe: TableRecipe) -> Facts:
    """Gather a start table by ``recipe`` and save it."""
    vocab_size = job.model.config.get_text_config().vocab_size
    table = gather(job.store, job.split.train, vocab_size, recipe.contexts, target_facts(job.model))
    job.save(lambda: table.save(job.folder))
    accuracy = judge(table, job.store, job.split.held_out)
    hits = ", ".join(f"{name} {rates[0]:.3f}" for name, rates in accuracy.items())
    job.say(f"{table.num_contexts} contexts; on held-out text {hits}")
    return {"num_contexts": table.num_contexts, **accuracy}


@dataclass(frozen=True, slots=True)
class _Places:
    """Positions of one shard and the target's distributions behind them."""

    tokens: Ints  # (T,)
    depths: Ints  # (T,) place in its own text
    ids: Ints  # (T, K)
    probs: Floats  # (T, K)

    def codes(self, order: int, vocab_size: int) -> tuple[Ints, NDArray[np.bool_]]:
        """(T,) a number for the last ``order`` tokens, the newest counting most, and where there are so many."""
        codes = np.zeros(len(self.tokens), np.int64)
        for back in range(order):
            codes = codes * vocab_size + np.roll(self.tokens, back)
        return codes, self.depths >= order - 1


def gather(
    store: FeatureStore, shards: Sequence[int], vocab_size: int, num_contexts: int, facts: dict[str, Any]
) -> StartTable:
    """The table of the ``num_contexts`` contexts of 1 to 3 tokens that occur most often in ``shards``.

    Raises:
        ValueError: fewer than one context, or a vocabulary beyond 2 million token ids.
    """
    if num_contexts < 1:
        raise ValueError(f"a start table needs at least 1 context, got {num_contexts}")
    if vocab_size >= 1 << 21:
        raise ValueError(f"a start table is made for vocabularies below {1 << 21} token ids, got {vocab_size}")
    counted = [_counts(store, shards, order, vocab_size) for order in range(1, MAX_ORDER + 1)]
    orders = []
    below: tuple[Ints, Ints, Floats] | None = None
    for order, (codes, counts) in enumerate(_most_frequent(counted, num_contexts), 1):
        below = _averaged(store, shards, order, vocab_size, codes, counts, below)
        tokens, probs = below[1][:, :_NUM_SUCCESSORS], below[2][:, :_NUM_SUCCESSORS]
        orders.append(Order(_decoded(codes, order, vocab_size), tokens.astype(np.int32), probs.astype(np.float32)))
    return StartTable(vocab_size, orders, facts)


def judge(table: StartTable, store: FeatureStore, shards: Sequence[int]) -> dict[str, list[float]]:
    """How often the target's best token is among the table's best 1, 4 or 8 at the places of ``shards``."""
    hits, total = dict.fromkeys(RANKS, 0), 0
    for places in _read(store, shards):
        for i in np.flatnonzero(places.depths >= MAX_ORDER - 1).tolist():
            keys = keys_of(tuple(places.tokens[i - MAX_ORDER + 1 : i + 1].tolist()))
            _, successors, _ = table.find(keys)
            best = int(places.ids[i, 0])
            rank = successors.index(best) if best in successors else len(successors) + max(RANKS)
            total += 1
            for limit in RANKS:
                hits[limit] += rank < limit
    return {f"top{limit}": [round(count / max(total, 1), 4)] for limit, count in hits.items()}


def _read(store: FeatureStore, shards: Sequence[int]) -> Iterator[_Places]:
    for shard in shards:
        sizes, tokens, ids, logprobs = store.predictions(shard, _KEPT)
        depths = np.concatenate([np.arange(size) for size in sizes])
        yield _Places(tokens.numpy(), depths, ids.numpy(), np.exp(logprobs.double().numpy()))


def _counts(store: FeatureStore, shards: Sequence[int], order: int, vocab_size: int) -> tuple[Ints, Ints]:
    """The contexts of ``order`` tokens as sorted codes, and how often each occurs."""
    codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for places in _read(store, shards):
        shard_codes, is_whole = places.codes(order, vocab_size)
        new, number = np.unique(shard_codes[is_whole], return_counts=True)
        joined, where = np.unique(np.concatenate([codes, new]), return_inverse=True)
        codes, counts = joined, np.bincount(where, np.concatenate([counts, number])).astype(np.int64)
    return codes, counts


def _most_frequent(counted: Sequence[tuple[Ints, Ints]], total: int) -> list[tuple[Ints, Ints]]:
    """The ``total`` most frequent of all lengths; of equally frequent ones the shorter, on which the longer rest."""
    counts = np.concatenate([of_length[1] for of_length in counted])
    lengths = np.repeat(np.arange(len(counted)), [len(of_length[1]) for of_length in counted])
    kept = np.zeros(len(counts), np.bool_)
    kept[np.lexsort((lengths, -counts))[:total]] = True
    return [(codes[kept[lengths == i]], numbers[kept[lengths == i]]) for i, (codes, numbers) in enumerate(counted)]


def _averaged(
    store: FeatureStore,
    shards: Sequence[int],
    order: int,
    vocab_size: int,
    codes: Ints,
    counts: Ints,
    below: tuple[Ints, Ints, Floats] | None,
) -> tuple[Ints, Ints, Floats]:
    """``codes`` (c,), their likeliest tokens (c, K), -1 for none, and how likely these are."""
    pairs, sums = _summed(store, shards, order, vocab_size, codes)
    share = 1 / (counts + _WEIGHT)
    values = sums * share[pairs // vocab_size]
    if below is not None and len(below[0]):
        shorter, tokens, probs = below
        at = np.searchsorted(shorter, codes // vocab_size).clip(max=len(shorter) - 1)
        weight = np.where(shorter[at] == codes // vocab_size, _WEIGHT * share, 0.0)
        more = (np.arange(len(codes))[:, None] * vocab_size + tokens[at])[tokens[at] >= 0]
        pairs, values = _merged([pairs, more], [values, (weight[:, None] * probs[at])[tokens[at] >= 0]])
    return codes, *_best(pairs, values, len(codes), vocab_size)


def _summed(
    store: FeatureStore, shards: Sequence[int], order: int, vocab_size: int, codes: Ints
) -> tuple[Ints, Floats]:
    """Sorted pairs (row of ``codes`` times vocabulary plus token) and the sum of the token's probabilities there."""
    pairs, sums = [np.zeros(0, np.int64)], [np.zeros(0)]
    for places in _read(store, shards):
        shard_codes, is_whole = places.codes(order, vocab_size)
        rows = np.searchsorted(codes, shard_codes).clip(max=max(len(codes) - 1, 0))
        is_kept = is_whole & (codes[rows] == shard_codes) if len(codes) else np.zeros_like(is_whole)
        pairs.append((rows[is_kept, None] * vocab_size + places.ids[is_kept]).ravel())
        sums.append(places.probs[is_kept].ravel())
        if sum(map(len, pairs[1:])) > _MERGE_EVERY:
            merged, total = _merged(pairs, sums)
            pairs, sums = [merged], [total]
    return _merged(pairs, sums)


def _merged(pairs: Sequence[Ints], sums: Sequence[Floats]) -> tuple[Ints, Floats]:
    """Each pair once, with the sum of its values."""
    joined, where = np.unique(np.concatenate(pairs), return_inverse=True)
    return joined, np.bincount(where, np.concatenate(sums), len(joined)).astype(np.float64)


def _best(pairs: Ints, values: Floats, num_rows: int, vocab_size: int) -> tuple[Ints, Floats]:
    """The likeliest tokens of each row (c, K), best first, -1 for none, and how likely they are."""
    rows, tokens = pairs // vocab_size, pairs % vocab_size
    order = np.lexsort((-values, rows))
    rows, tokens, values = rows[order], tokens[order], values[order]
    ranks = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = ranks < _KEPT
    best, probs = np.full((num_rows, _KEPT), -1, np.int64), np.zeros((num_rows, _KEPT))
    best[rows[kept], ranks[kept]], probs[rows[kept], ranks[kept]] = tokens[kept], values[kept]
    return best, probs


def _decoded(codes: Ints, order: int, vocab_size: int) -> Ints:
    """(c, o) the tokens, the newest last."""
    columns = []
    for _ in range(order):
        columns.append(codes % vocab_size)  # the oldest counts least
        codes = codes // vocab_size
    return np.stack(columns, 1)
