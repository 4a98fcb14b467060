"""From raw logits to the target's distribution at a tree node: the fused fast path, or any logits processors.

Processors run lazily, at the nodes that the verification walk visits, each with its own path as history: so a rule
that depends on the path (a penalty, a grammar) is exact, and costs at most depth + 1 calls a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec.errors import NonFiniteLogitsError, UnsupportedOptionError
from specdec.interfaces import Row, Scores, TargetDistributions
from specdec.sampling import SamplingParams, sampling_probs
from specdec.tree import TokenTree

Processors = Callable[[Tensor, Tensor], Tensor]  # (B, L) token ids and (B, V) scores -> (B, V) scores


@runtime_checkable
class NodeProcessor(Protocol):
    """A processor for one row at any node, which is told the row and the path and not shown their ids."""

    def at_node(self, row: Row, length: int, path: Sequence[int], scores: Tensor) -> Tensor:
        """The processed ``scores`` (V,) behind the row's first ``length`` tokens and ``path``."""


class LogitsTransform(Protocol):
    """How the target picks its next token from its logits."""

    @property
    def params(self) -> SamplingParams:
        """What a drafter should imitate; exactness never depends on it."""

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetDistributions:
        """The distributions at the nodes of ``tree``."""


@dataclass(frozen=True, slots=True)
class WarperTransform:
    """Temperature, top-k, top-p and min-p and nothing else: no history is needed."""

    params: SamplingParams

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetDistributions:
        return NodeDistributions(self.params, row, tree, scores.logits, None)


@dataclass(slots=True)
class ProcessorTransform:
    """Any list of transformers' logits processors and warpers, applied as generate() does, to one row at a time.

    ``padding`` holds, for each row key, what stands before the row's own tokens in the ids that processors see:
    generate() shows them the left-padded batch.
    """

    processors: Sequence[Any]
    params: SamplingParams  # greedy: the best processed score is taken; else a sample from their softmax
    padding: dict[int, list[int]] = field(default_factory=dict)
    _histories: Histories = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._histories = Histories(self.padding)

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetDistributions:
        # The row grows by what is emitted, and a node's history does not: it may be asked for later.
        return NodeDistributions(
            self.params, row, tree, scores.logits, partial(self._apply, row, len(row.tokens), tree)
        )

    def _apply(self, row: Row, length: int, tree: TokenTree, node: int, scores: Tensor) -> Tensor:
        """The processed ``scores`` (V,) behind the row's first ``length`` tokens and the path to ``node``."""
        path = tree.path_tokens(node)
        input_ids = self._histories.ids(row, length, path, scores.device)
        for processor in self.processors:
            if isinstance(processor, NodeProcessor):
                scores = processor.at_node(row, length, path, scores)
            else:
                scores = processed(_for_row(processor, row.key), input_ids, scores[None])[0]
        return scores


def processed(processor: Processors, input_ids: Tensor, scores: Tensor) -> Tensor:
    """What ``processor`` makes of ``scores`` (B, V) behind ``input_ids`` (B, L).

    Raises:
        UnsupportedOptionError: it answers with another shape, or writes into the ids.
    """
    before = version(input_ids)
    answer = processor(input_ids, scores)
    if not isinstance(answer, Tensor) or answer.shape != scores.shape:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UnsupportedOptionError(
            f"a logits processor must return scores of the shape that it is given, {tuple(scores.shape)}; "
            f"{type(processor).__name__} returned {got}"
        )
    if version(input_ids) != before:
        raise UnsupportedOptionError(
            f"{type(processor).__name__} writes into input_ids, which would change the text behind the model's back; "
            "let it work on a copy"
        )
    return answer


def version(tensor: Tensor) -> int | None:
    """A number that grows when ``tensor`` is written to; None: torch does not count (in inference mode)."""
    return None if tensor.is_inference() else tensor._version


@dataclass(frozen=True, slots=True)
class InBatch:
    """A processor or criterion that looks each row's own parameters up by its place in the batch of ``num_rows``.

    It is asked about one row in a batch of copies of it: exact if its answer for a row depends on nothing else than
    that row.
    """

    asked: Any
    num_rows: int

    def for_row(self, row: int) -> Processors:
        def ask(input_ids: Tensor, scores: Tensor) -> Tensor:
            many = (tensor.repeat(self.num_rows, 1) for tensor in (input_ids, scores))
            return processed(self.asked, *many)[row : row + 1]

        return ask


def _for_row(processor: Any, row: int) -> Any:
    """``processor`` itself, or what asks it about the row with this key."""
    if isinstance(processor, InBatch):
        return processor.for_row(row)
    # Sparing the copies that InBatch takes: every left-padded batch has this one.
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor) and ignored.numel() > 1:
        processor = copy.copy(processor)
        processor.prompt_ignore_length = int(ignored[row])
    return processor


@dataclass(slots=True)
class GrowingIds:
    """Token ids (B, t) in a buffer that grows: showing them costs one copy on their device, and no loop in Python."""

    _buffer: Tensor
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = self._buffer.shape[1]

    def column(self, tokens: Sequence[int]) -> Tensor:
        """(B, 1) of one token for each row."""
        return self._buffer.new_tensor(tokens)[:, None]

    def extend(self, columns: Tensor) -> None:
        """Append ``columns`` (B, k)."""
        end = self.length + columns.shape[1]
        if end > self._buffer.shape[1]:
            room = self._buffer.new_empty((self._buffer.shape[0], 2 * end))
            room[:, : self.length] = self._buffer[:, : self.length]
            self._buffer = room
        self._buffer[:, self.length : end] = columns
        self.length = end

    def shown(self, path: Sequence[int] = (), length: int | None = None) -> Tensor:
        """(B, t + len(path)) a copy of the first t = ``length`` columns (None: all), with ``path`` behind every row.

        Whoever is shown it may keep it.
        """
        known = self._buffer[:, : self.length if length is None else length]
        if not path:
            return known.clone()
        return torch.cat((known, known.new_tensor(path).expand(len(known), -1)), 1)


@dataclass(slots=True)
class Histories:
    """What is shown of single rows: padding, the row's tokens, and a path behind them."""

    padding: Mapping[int, Sequence[int]]
    _known: dict[int, tuple[Row, GrowingIds, int]] = field(default_factory=dict)  # and how many tokens of the row

    def ids(self, row: Row, length: int, path: Sequence[int], device: torch.device) -> Tensor:
        """(1, L) of its own: the row's first ``length`` tokens behind its padding, and ``path``."""
        known, ids, num_tokens = self._known.get(row.key, (None, None, 0))
        if known is not row or ids is None:
            ids, num_tokens = GrowingIds(torch.tensor([self.padding.get(row.key, ())], device=device).long()), 0
        if num_tokens < len(row.tokens):
            ids.extend(torch.tensor([row.tokens[num_tokens:]], device=device))
            self._known[row.key] = row, ids, len(row.tokens)
        return ids.shown(path, len(self.padding.get(row.key, ())) + length)


@dataclass(slots=True)
class NodeDistributions:
    """TargetDistributions of one tree; each visited node is processed once."""

    params: SamplingParams
    row: Row
    tree: TokenTree
    logits: Tensor  # (n, V)
    apply: Callable[[int, Tensor], Tensor] | None  # a node and its scores (V,) -> processed scores (V,)
    is_warped: bool = True  # ``apply`` includes temperature and filters; otherwise ``params`` come behind it
    _scores: dict[int, Tensor] = field(default_factory=dict)
    _probs: dict[int, Tensor] = field(default_factory=dict)
    _bests: list[tuple[int, float]] | None = None

    @property
    def is_greedy(self) -> bool:
        return self.params.is_greedy

    def scores(self, node: int) -> Tensor:
        """Processed scores (V,), float32 as in generate() (float64 if the model is)."""
        if node not in self._scores:
            raw = self.logits[node]
            if self.apply is not None:
                self._scores[node] = self.apply(node, in_float32(raw))
            else:
                self._scores[node] = raw if raw.dtype == torch.float64 else raw.float()
        return self._scores[node]

    def best(self, node: int) -> int:
        if self.apply is None and _must_wait(self.logits.device):
            if self._bests is None:
                self._bests = best_tokens(self.logits)
            token, score = self._bests[node]
        else:
            scores = self.scores(node)
            best = scores.argmax(-1)
            token, score = int(best), float(scores[best])
        self._check(node, score)
        return token

    def probs(self, node: int) -> Tensor:
        if node not in self._probs:
            self._probs[node] = self._computed(node)
        return self._probs[node]

    def _computed(self, node: int) -> Tensor:
        if self.is_greedy:
            self.best(node)  # raises for NaN, which the one-hot distribution would hide
            probs = sampling_probs(self.scores(node), self.params)
        elif self.apply is None:
            probs = sampling_probs(self.logits[node], self.params)
        elif not self.is_warped:
            probs = sampling_probs(self.scores(node), self.params)
        else:
            probs = self.scores(node).softmax(-1)
        self._check(node, float(probs.sum()))
        return probs

    def _check(self, node: int, value: float) -> None:
        if not abs(value) < float("inf"):  # NaN too
            raise non_finite_logits(self.row, self.tree, node)


def in_float32(raw: Tensor) -> Tensor:
    """Scores as processors see them, which may write into them: a copy in float32 (float64 if the model is)."""
    return raw.to(raw.dtype if raw.dtype == torch.float64 else torch.float32, copy=True)


def non_finite_logits(row: Row, tree: TokenTree, node: int) -> NonFiniteLogitsError:
    """The error that no token can be picked after ``node``."""
    position = len(row.tokens) + len(tree.path_tokens(node))
    return NonFiniteLogitsError(
        f"cannot pick a token: the logits for position {position} of row {row.key} hold NaN or infinity, or every "
        "token is excluded (try float32, or check the model's weights and the logits processors)"
    )


def best_tokens(logits: Tensor) -> list[tuple[int, float]]:
    """For each row of ``logits`` (n, V) the best token and its logit, in one copy to the host."""
    best = logits.max(-1)
    tokens, scores = torch.stack((best.indices.double(), best.values.double())).tolist()
    return [(int(token), score) for token, score in zip(tokens, scores, strict=True)]


def _must_wait(device: torch.device) -> bool:
    """Whether each number that is read waits for the device: then all nodes are decided at once."""
    return device.type != "cpu"
