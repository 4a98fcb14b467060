"""Which tokens the target expects after frequent contexts: gathered ahead from text of its own, then only read.

Letters for shapes: c contexts, o tokens of a context, k successors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafters.heads.checkpoint_io import CONFIG, TensorFiles, check_tensors, read_json, save_tensors
from specdec.drafters.lookup.successors import Found, classes_of, hashed
from specdec.errors import CheckpointError

_WEIGHTS = "successors.safetensors"
_FORMAT = 1
_SMALL_IDS = 2**16  # vocabularies below it are kept in 16 bits, with the size itself for "none"


@dataclass(frozen=True, slots=True)
class Order:
    """What a table made ahead holds for contexts of one length."""

    contexts: NDArray[np.int64]  # (c, o)
    successors: NDArray[np.int32]  # (c, k) best first, -1: none
    probs: NDArray[np.float32]  # (c, k) how likely the target holds each, on average


@dataclass(slots=True)
class StartTable:
    """What the target expects after contexts of 1 to ``max_order`` tokens, gathered ahead from text of its own; only read.

    Args:
        vocab_size: token ids of the target.
        orders: for contexts of 1, 2, ... tokens.
        facts: what is known of the target that it was made for (``specdec_target`` of its config).
    """

    vocab_size: int
    orders: Sequence[Order]
    facts: dict[str, Any] = field(default_factory=dict)
    _rows: list[dict[int, int]] = field(init=False)  # for each length, hash -> row
    _classes: list[NDArray[np.uint8]] = field(init=False)

    def __post_init__(self) -> None:
        self._rows = [
            dict(zip(hashed(order.contexts).tolist(), range(len(order.contexts)), strict=True)) for order in self.orders
        ]
        self._classes = [classes_of(order.probs) for order in self.orders]

    @property
    def max_order(self) -> int:
        return len(self.orders)

    @property
    def num_contexts(self) -> int:
        return sum(len(order.contexts) for order in self.orders)

    def find(self, keys: Sequence[int]) -> Found:
        """As :meth:`SuccessorTable.find`."""
        for order in range(min(len(keys), len(self.orders)), 0, -1):
            row = self._rows[order - 1].get(keys[order - 1])
            if row is not None:
                tokens = [token for token in self.orders[order - 1].successors[row].tolist() if token >= 0]
                return order, tokens, self._classes[order - 1][row, : len(tokens)].tolist()
        return 0, [], []

    def save(self, path: str | Path, more: dict[str, Any] | None = None) -> None:
        """Write the folder ``path``, atomically; ``more`` goes into its config."""
        tensors: dict[str, Tensor] = {}
        for length, order in enumerate(self.orders, 1):
            tensors[f"contexts.{length}"] = _packed_ids(order.contexts, self.vocab_size)
            tensors[f"successors.{length}"] = _packed_ids(order.successors, self.vocab_size)
            # Roots keep small probabilities apart in 8 bits.
            tensors[f"roots.{length}"] = torch.from_numpy(np.round(255 * np.sqrt(order.probs)).astype(np.uint8))
        config = {
            "drafter": "recycling",
            "format": _FORMAT,
            "vocab_size": self.vocab_size,
            "num_contexts": [len(order.contexts) for order in self.orders],
            "num_successors": self.orders[0].successors.shape[1],
            "specdec_target": self.facts,
        }
        save_tensors(tensors, config | (more or {}), Path(path), _WEIGHTS)

    @classmethod
    def load(cls, path: str | Path, vocab_size: int) -> StartTable:
        """A table that :meth:`save` wrote, for a target of ``vocab_size`` token ids.

        Raises:
            CheckpointError: no such table, a damaged one, or one for another vocabulary.
        """
        path = Path(path).expanduser()
        files = TensorFiles(path, (_WEIGHTS,))
        config = read_json((path if path.is_dir() else path.parent) / CONFIG)
        sizes: Any = config.get("num_contexts")
        width: Any = config.get("num_successors")
        if (
            config.get("drafter") != "recycling"
            or not isinstance(sizes, list)
            or not all(map(_is_size, (*sizes, width)))
        ):
            raise CheckpointError(
                f"{path} is no start table of drafter 'recycling': make one with specdec train recycling"
            )
        if config.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} is of format {config.get('format')}, this version reads {_FORMAT}: make it anew"
            )
        if config.get("vocab_size") != vocab_size:
            raise CheckpointError(
                f"{path} was made for {config.get('vocab_size')} token ids and the target has {vocab_size}: it needs "
                "a target with the same tokenizer"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for order, size in enumerate(sizes, 1):
            shapes |= {
                f"contexts.{order}": (size, order),
                f"successors.{order}": (size, width),
                f"roots.{order}": (size, width),
            }
        tensors = files.read(files.keys)
        check_tensors(tensors, shapes, path)
        orders = []
        for order in range(1, len(sizes) + 1):
            contexts = _unpacked_ids(tensors[f"contexts.{order}"], vocab_size)
            successors = _unpacked_ids(tensors[f"successors.{order}"], vocab_size)
            for name, ids in (("contexts", contexts), ("successors", successors)):
                if ids.size and not (ids.min() >= -1 and ids.max() < vocab_size):
                    raise CheckpointError(
                        f"{name}.{order} in {path} must be ids in [0, {vocab_size}): the file is damaged"
                    )
            probs = (tensors[f"roots.{order}"].numpy().astype(np.float32) / 255) ** 2
            orders.append(Order(contexts.astype(np.int64), successors.astype(np.int32), probs.astype(np.float32)))
        return cls(vocab_size, orders, config.get("specdec_target") or {})


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _packed_ids(ids: NDArray[Any], vocab_size: int) -> Tensor:
    if vocab_size < _SMALL_IDS:
        return torch.from_numpy(np.where(ids < 0, vocab_size, ids).astype(np.uint16))
    return torch.from_numpy(ids.astype(np.int32))


def _unpacked_ids(packed: Tensor, vocab_size: int) -> NDArray[Any]:
    ids: NDArray[Any] = packed.numpy().astype(np.int64)
    return np.where(ids == vocab_size, -1, ids)
