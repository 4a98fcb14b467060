"""Which tokens follow which contexts: a table that is written as text goes by.

A context of 1 to ``max_order`` tokens is known by a 64-bit hash, the same as in a ``StartTable``, so that one walk over the
latest tokens finds it in either. Letters for shapes: c contexts, o tokens of a context, k successors, t tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Context = tuple[int, ...]  # the newest token last; -1 where the text has not begun
Found = tuple[int, list[int], list[int]]  # how long the known context is (0: none), its successors, their classes

_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1

# Classes of successors: by the target's probability at the time, or by rank where only the text is known.
BOUNDS = np.array([0.98, 0.9, 0.7, 0.5, 0.3, 0.15, 0.07, 0.03], np.float32)  # between the classes 0 to 8
TYPICAL = (0.99, 0.94, 0.8, 0.6, 0.4, 0.22, 0.1, 0.05, 0.01)
TEXT_RATES = (0.5, 0.22, 0.1)  # of the latest follower, of the one before, of those before that
FIRST_TEXT = len(TYPICAL)
NUM_CLASSES = FIRST_TEXT + len(TEXT_RATES)


def keys_of(context: Context) -> list[int]:
    """The hashes of the last 1, 2, ... tokens of ``context``."""
    keys = []
    key = 0
    for token in reversed(context):
        key = (key ^ (token + 1)) * _MULTIPLIER & _MASK
        keys.append(key)
    return keys


def hashed(contexts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(c,) the hashes of ``contexts`` (c, o)."""
    keys = np.zeros(len(contexts), np.uint64)
    for column in range(contexts.shape[1] - 1, -1, -1):
        keys = _extended(keys, contexts[:, column])
    return keys


def _extended(keys: NDArray[np.uint64], tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hashes of contexts (c,) with one older token more."""
    return (keys ^ (tokens + 1).astype(np.uint64)) * np.uint64(_MULTIPLIER)


@dataclass(slots=True)
class SuccessorTable:
    """The latest successors of contexts of 1 to ``max_order`` tokens, in memory that never grows.

    A context is known by a 64-bit hash and has one slot among those of its length, which it takes from whatever stood
    there: old contexts fade out. A collision of hashes would cost acceptance, never exactness.
    """

    max_order: int
    num_successors: int
    capacity: int  # contexts of each length
    keys: NDArray[np.uint64] = field(init=False)  # (max_order, capacity)  0: empty
    successors: NDArray[np.int32] = field(init=False)  # (max_order, capacity, k)  best first, -1: none
    classes: NDArray[np.uint8] = field(init=False)  # (max_order, capacity, k)

    def __post_init__(self) -> None:
        self.keys = np.zeros((self.max_order, self.capacity), np.uint64)
        self.successors = np.full((self.max_order, self.capacity, self.num_successors), -1, np.int32)
        self.classes = np.zeros((self.max_order, self.capacity, self.num_successors), np.uint8)

    def lookup(self, context: Context) -> Found:
        """Of the longest known part of ``context``: how long it is (0: none), its successors and their classes."""
        return self.find(keys_of(context))

    def find(self, keys: Sequence[int]) -> Found:
        """As :meth:`lookup`, for the hashes of a context."""
        for order in range(min(len(keys), self.max_order), 0, -1):
            key = keys[order - 1]
            slot = (key >> 32) * self.capacity >> 32
            if self.keys[order - 1, slot] == key:
                tokens = [token for token in self.successors[order - 1, slot].tolist() if token >= 0]
                return order, tokens, self.classes[order - 1, slot, : len(tokens)].tolist()
        return 0, [], []

    def write(self, contexts: NDArray[np.int64], successors: NDArray[np.int32], classes: NDArray[np.uint8]) -> None:
        """Remember ``successors`` and their ``classes`` (c, k) of ``contexts`` (c, o); of equal ones the last counts."""
        self._store(contexts.shape[1], hashed(contexts), successors, classes)

    def write_parts(
        self, contexts: NDArray[np.int64], successors: NDArray[np.int32], classes: NDArray[np.uint8]
    ) -> None:
        """As :meth:`write`, for the last 1 to ``max_order`` tokens of ``contexts`` (c, at least max_order)."""
        keys = np.zeros(len(contexts), np.uint64)
        for order in range(1, self.max_order + 1):
            keys = _extended(keys, contexts[:, -order])
            self._store(order, keys, successors, classes)

    def _store(
        self, order: int, keys: NDArray[np.uint64], successors: NDArray[np.int32], classes: NDArray[np.uint8]
    ) -> None:
        slots = self._slots(keys)
        self.keys[order - 1, slots] = keys
        self.successors[order - 1, slots] = successors
        self.classes[order - 1, slots] = classes

    def _slots(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return (keys >> np.uint64(32)) * np.uint64(self.capacity) >> np.uint64(32)

    def read_text(self, tokens: Sequence[int]) -> None:
        """Remember what followed what in ``tokens``, the latest first, before what was known."""
        ids = np.array(tokens, np.int64)
        keys = np.zeros(len(ids), np.uint64)  # of the context before each token
        for order in range(1, min(self.max_order, len(ids) - 1) + 1):
            keys = _extended(keys[1:], ids[: len(ids) - order])
            own, successors = latest_successors(keys, ids[order:], self.num_successors)
            ranks = np.arange(self.num_successors).clip(max=len(TEXT_RATES) - 1)
            classes = np.broadcast_to((FIRST_TEXT + ranks).astype(np.uint8), successors.shape)
            self._store(order, own, *self._joined(order, own, successors, classes))

    def _joined(
        self, order: int, keys: NDArray[np.uint64], successors: NDArray[np.int32], classes: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """``successors`` and ``classes`` (c, k) of different contexts, then what was known of these that is not among them."""
        slots = self._slots(keys)
        older = np.where(
            (self.keys[order - 1, slots] == keys)[:, None], self.successors[order - 1, slots], np.int32(-1)
        )
        for column in successors.T:
            older[older == column[:, None]] = -1
        tokens = np.concatenate([successors, older], 1)
        kinds = np.concatenate([classes, self.classes[order - 1, slots]], 1)
        places = np.argsort(tokens < 0, axis=1, kind="stable")[:, : self.num_successors]  # those that are there first
        tokens, kinds = np.take_along_axis(tokens, places, 1), np.take_along_axis(kinds, places, 1)
        return tokens, np.where(tokens < 0, np.uint8(0), kinds)


def latest_successors(
    keys: NDArray[np.uint64], tokens: NDArray[np.int64], num: int
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """The different ``keys`` (c,), and the ``num`` latest tokens that came after each, the latest first.

    Args:
        keys: (t,) of the context before each token of a text.
        tokens: (t,)
        num: k

    Returns:
        Keys (c,) in the order of their last place, and successors (c, k), -1: none.
    """
    # Backwards, so that the first of equal ones is the latest.
    keys, tokens = keys[::-1], tokens[::-1]
    order = np.lexsort((tokens, keys))  # stable: equal pairs stay in the order of the text
    is_first = np.ones(len(keys), np.bool_)
    is_first[1:] = (np.diff(keys[order]) != 0) | (np.diff(tokens[order]) != 0)
    places = np.sort(order[is_first])  # of the different pairs, the latest first
    keys, tokens = keys[places], tokens[places]
    own, first, group = np.unique(keys, return_index=True, return_inverse=True)
    by_group = np.argsort(group, kind="stable")
    sizes = np.bincount(group, minlength=len(own))
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(keys), np.intp)
    rank[by_group] = np.arange(len(keys)) - starts[group[by_group]]
    successors = np.full((len(own), num), -1, np.int32)
    is_kept = rank < num
    successors[group[is_kept], rank[is_kept]] = tokens[is_kept]
    by_time = np.argsort(-first)
    return own[by_time], successors[by_time]


def classes_of(probs: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """The class of each probability."""
    return (len(BOUNDS) - np.searchsorted(BOUNDS[::-1], probs, side="left")).astype(np.uint8)
