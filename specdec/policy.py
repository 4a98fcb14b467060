"""From raw logits to the target's distribution at a tree node: the fused fast path, or any logits processors.

Processors run lazily, at the nodes that the verification walk visits, each with its own path as history: so a rule
that depends on the path (a penalty, a grammar) is exact, and costs at most depth + 1 calls a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.errors import NonFiniteLogitsError, UnsupportedOptionError
from specdec.interfaces import Row, Scores, TargetProbs
from specdec.sampling import SamplingParams, sampling_probs
from specdec.tree import TokenTree

Processors = Callable[[Tensor, Tensor], Tensor]  # (1, L) token ids and (1, V) scores -> (1, V) scores

# Bound to the rows of one batch, stateful from call to call, or calling the model themselves: not for tree nodes.
UNSUPPORTED_PROCESSORS = (
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
    "WhisperNoSpeechDetection",
    "AlternatingCodebooksLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
)


class Policy(Protocol):
    """How the target picks its next token from its logits."""

    @property
    def params(self) -> SamplingParams:
        """What a drafter should imitate; exactness never depends on it."""

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetProbs:
        """The distributions at the nodes of ``tree``."""


@dataclass(frozen=True, slots=True)
class ParamsPolicy:
    """Temperature, top-k, top-p and min-p and nothing else: no history is needed."""

    params: SamplingParams

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetProbs:
        return LazyProbs(self.params, row, tree, scores.logits, None)


@dataclass(frozen=True, slots=True)
class ProcessorPolicy:
    """Any list of transformers' logits processors and warpers, applied as generate() does.

    ``padding`` holds, for each row key, what stands before the row's own tokens in the ids that processors see:
    generate() shows them the left-padded batch.
    """

    processors: Sequence[Any]
    params: SamplingParams  # greedy: the best processed score is taken; else a sample from their softmax
    padding: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for processor in self.processors:
            name = type(processor).__name__
            if name in UNSUPPORTED_PROCESSORS:
                raise UnsupportedOptionError(
                    f"{name} cannot be applied at the nodes of a token tree (it is bound to a batch row, keeps state "
                    "between calls or calls the model); leave out the option that adds it"
                )

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetProbs:
        return LazyProbs(self.params, row, tree, scores.logits, self._apply)

    def _apply(self, row: Row, path: Sequence[int], scores: Tensor) -> Tensor:
        ids = [*self.padding.get(row.key, ()), *row.tokens, *path]
        input_ids = torch.tensor([ids], device=scores.device)
        scores = scores[None]
        for processor in self.processors:
            scores = _for_row(processor, row.key)(input_ids, scores)
        return scores[0]


def _for_row(processor: Any, row: int) -> Any:
    """``processor`` itself, or a copy that holds the prompt length of one row where it holds one for each."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor) and ignored.numel() > 1:
        processor = copy.copy(processor)
        processor.prompt_ignore_length = int(ignored[row])
    return processor


@dataclass(slots=True)
class LazyProbs:
    """TargetProbs of one tree; each visited node is processed once."""

    params: SamplingParams
    row: Row
    tree: TokenTree
    logits: Tensor  # (n, V)
    apply: Callable[[Row, Sequence[int], Tensor], Tensor] | None
    _scores: dict[int, Tensor] = field(default_factory=dict)
    _bests: list[tuple[int, float]] | None = None

    @property
    def is_greedy(self) -> bool:
        return self.params.is_greedy

    def scores(self, node: int) -> Tensor:
        """Processed scores (V,), float32 as in generate() (float64 if the model is)."""
        if node not in self._scores:
            raw = self.logits[node]
            scores = raw if raw.dtype == torch.float64 else raw.float()
            if self.apply is not None:
                # A processor may write in place; the raw logits stay as they are.
                copied = scores.clone() if scores is raw else scores
                scores = self.apply(self.row, self.tree.path_tokens(node), copied)
            self._scores[node] = scores
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
        if self.is_greedy:
            self.best(node)  # raises for NaN, which the one-hot distribution would hide
            probs = sampling_probs(self.scores(node), self.params)
        elif self.apply is None:
            probs = sampling_probs(self.logits[node], self.params)
        else:
            probs = self.scores(node).softmax(-1)
        self._check(node, float(probs.sum()))
        return probs

    def _check(self, node: int, value: float) -> None:
        if not abs(value) < float("inf"):  # NaN too
            raise non_finite_logits(self.row, self.tree, node)


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
