"""Which processors and criteria may be asked about one row at any of its positions, and how.

Such an object answers for a row by what it is shown of that row alone, and keeps nothing from call to call. Then rows
can run ahead of each other, and nodes be asked in any order. Nobody can prove that of code; it is taken from

- what the caller declares: an attribute ``is_rowwise = True``;
- transformers' own classes, if an instance holds plain data only and a trial on a copy of it leaves no trace.

Everything else is asked as generate() asks it (specdec.generation.lockstep).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specdec.distributions import Histories, InBatch, NodeProcessor, processed
from specdec.errors import UnsupportedOptionError
from specdec.generation.snapshot import UnreadableStateError, changes, is_plain
from specdec.interfaces import Row

Trial = Callable[[Any], Any]  # calls an object with made-up arguments

_TRIED: dict[type, bool] = {}  # classes of transformers: whether a trial left no trace


def is_declared(thing: Any) -> bool:
    """Whether its author says so."""
    return getattr(thing, "is_rowwise", False) is True


def is_rowwise(thing: Any, trial: Trial) -> bool:
    """Whether ``thing`` may be asked about one row at a time; ``trial`` calls a copy of it."""
    if is_declared(thing):
        return True
    kind = type(thing)
    if kind.__module__.split(".")[0] != "transformers" or not is_plain(getattr(thing, "__dict__", None)):
        return False
    if kind not in _TRIED:
        try:
            copied = copy.deepcopy(thing)
            trial(copied)  # the first call may prepare things
            _TRIED[kind] = not any(changes(copied, lambda: trial(copied))[1] for _ in range(2))
        except Exception:  # whatever is wrong with it shows when it is really asked
            return False
    return _TRIED[kind]


def for_one_row(thing: Any, num_rows: int) -> Any:
    """``thing``, or what asks it about one row of a batch of ``num_rows``, if it may hold parameters of each row."""
    if isinstance(thing, NodeProcessor):
        return thing
    if num_rows > 1 and (
        is_declared(thing) or any(_is_by_row(name, value, num_rows) for name, value in vars(thing).items())
    ):
        return InBatch(thing, num_rows)
    return thing


def _is_by_row(name: str, value: Any, num_rows: int) -> bool:
    """Whether ``value`` might have an entry for each row; more copies than needed only cost time."""
    if name == "prompt_ignore_length":  # each row gets its own: specdec.distributions
        return False
    if isinstance(value, Tensor):
        return value.dim() > 1 or (value.dim() == 1 and len(value) == num_rows)
    if isinstance(value, list | tuple):
        return len(value) == num_rows or any(isinstance(part, list | tuple | dict | Tensor) for part in value)
    return False


@dataclass(slots=True)
class Watched:
    """A processor for one row at nodes that need not be kept, refused as soon as it is seen to keep state."""

    processor: Any
    verifier: str
    _is_prepared: bool = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        try:
            answer: Tensor
            answer, is_changed = changes(self.processor, lambda: processed(self.processor, input_ids, scores))
        except UnreadableStateError as error:
            raise looks_ahead(self.processor, self.verifier, f"may keep state that cannot be seen ({error})") from None
        if is_changed and self._is_prepared:
            raise looks_ahead(self.processor, self.verifier, "keeps state from call to call")
        self._is_prepared = True  # the first call is at a root, so at a node that is kept
        return answer.clone()  # it may hand out the same tensor again


def looks_ahead(processor: Any, verifier: str, reason: str) -> UnsupportedOptionError:
    """The error that ``processor`` cannot be asked at nodes that are not kept."""
    return UnsupportedOptionError(
        f"verifier {verifier!r} looks ahead, at nodes that may not be kept, and the logits processor "
        f"{type(processor).__name__} {reason}; use verifier 'match' or 'rejection', which ask it once for each token, or "
        "give it the attribute is_rowwise = True if its answer depends on the ids and scores of a row alone"
    )


@dataclass(slots=True)
class RowEnds:
    """Where a row ends by its own ids: tokens that end a text, and criteria that may be asked about one row."""

    criteria: Sequence[Any]
    num_rows: int
    histories: Histories
    device: torch.device
    _eos: frozenset[int] = field(init=False)
    _others: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        eos = [c.eos_token_id.reshape(-1).tolist() for c in self.criteria if type(c) is EosTokenCriteria]
        self._eos = frozenset(token for ids in eos for token in ids)
        others = [c for c in self.criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        self._others = [for_one_row(criterion, self.num_rows) for criterion in others]

    def stop(self, row: Row) -> bool:
        """Whether the row ends with its newest token: asked after every one, so nothing overshoots."""
        if row.tokens[-1] in self._eos:
            return True
        if not self._others:
            return False
        ids = self.histories.ids(row, len(row.tokens), (), self.device)
        return any(_is_done(criterion, ids, row.key) for criterion in self._others)


def _is_done(criterion: Any, ids: Tensor, row: int) -> bool:
    """What ``criterion`` says of the row whose ``ids`` (1, L) are given."""
    if isinstance(criterion, InBatch):
        answers = criterion.asked(ids.repeat(criterion.num_rows, 1), None)
        return bool((torch.zeros(criterion.num_rows, dtype=torch.bool, device=ids.device) | answers)[row])
    return bool(torch.as_tensor(criterion(ids, None)).all())
