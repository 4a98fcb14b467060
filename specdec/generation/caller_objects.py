"""The caller's logits processors and stopping criteria: which of the ways to ask them is right, and fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specdec.distributions import Histories, LogitsTransform, ProcessorTransform
from specdec.generation.lockstep import LockstepPolicy, LockstepTarget, LockstepVerdicts
from specdec.generation.options import fast_policy, sampling_params
from specdec.generation.rowwise import RowEnds, Watched, for_one_row, is_declared, is_rowwise, looks_ahead
from specdec.interfaces import Row, Target, Verifier
from specdec.rng import Rng


@dataclass(frozen=True, slots=True)
class Given:
    """What generate() hands over for one batch."""

    input_ids: Tensor  # (B, L)
    padding_tokens: dict[int, list[int]]  # by row, what stands before its own tokens
    processors: Sequence[Any]
    criteria: Sequence[Any]
    config: Any
    model: Any  # the caller's own
    vocab_size: int

    @property
    def num_rows(self) -> int:
        return len(self.input_ids)

    @property
    def keeps_scores(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    @property
    def pad(self) -> int | None:
        """What rows that have ended are padded with; None: generate() lets them go on until all have ended."""
        if not any(hasattr(criterion, "eos_token_id") for criterion in self.criteria):
            return None
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    @property
    def ends_together(self) -> bool:
        """Whether rows that have ended go on until all have."""
        are_ends = any(type(criterion) is not MaxLengthCriteria for criterion in self.criteria)
        return self.num_rows > 1 and self.pad is None and are_ends

    def joint(self) -> tuple[list[Any], list[Any]]:
        """The processors, and the criteria, that must be asked about the whole batch."""
        processors = [p for p in self.processors if not is_rowwise(p, self._try_processor)]
        criteria = [c for c in self.criteria if not self._is_rowwise_criterion(c)]
        return processors, criteria

    def _try_processor(self, processor: Any) -> None:
        scores = torch.linspace(-4, 4, self.vocab_size, device=self.input_ids.device)
        processor(self.input_ids, scores.repeat(self.num_rows, 1))

    def _is_rowwise_criterion(self, criterion: Any) -> bool:
        if type(criterion) in (EosTokenCriteria, MaxLengthCriteria):
            return True
        if is_declared(criterion):
            return not self.keeps_scores  # it may read the scores, which belong to columns
        return is_rowwise(criterion, lambda each: each(self.input_ids, None))


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What the decode loop is built with."""

    logits_transform: LogitsTransform
    stop: Callable[[Row], bool]
    target: Target

    def decide(self, verifier: Verifier, rng: Rng) -> LockstepVerdicts | None:
        """How all rows are decided on where they hang together; None: each may be for itself."""
        return (
            LockstepVerdicts(self.logits_transform, verifier, rng)
            if isinstance(self.logits_transform, LockstepPolicy)
            else None
        )


def arrange(given: Given, verifier: Verifier, target: Target) -> Arrangement:
    """How the loop asks processors and criteria so that they see what generate() would show them.

    Raises:
        UnsupportedOptionError: a processor that may look at other rows, or keep state, and a verifier that looks ahead.
    """
    joint, joint_criteria = given.joint()
    params = sampling_params(given.config)
    must_watch = bool(joint) and not params.is_greedy and verifier.looks_ahead
    if must_watch and given.num_rows > 1:
        raise looks_ahead(joint[0], verifier.name, "may look at other rows of the batch or keep state")
    if joint and not must_watch:
        by_node = None
    else:
        watched = {id(processor) for processor in joint}
        by_node = fast_policy(given.processors, given.config) or ProcessorTransform(
            [
                Watched(p, verifier.name) if id(p) in watched else for_one_row(p, given.num_rows)
                for p in given.processors
            ],
            params,
            given.padding_tokens,
        )
        if not joint_criteria and not given.ends_together:
            ends = RowEnds(given.criteria, given.num_rows, Histories(given.padding_tokens), given.input_ids.device)
            return Arrangement(by_node, ends.stop, target)
    logits_transform = LockstepPolicy(
        given.input_ids,
        given.processors,
        given.criteria,
        params,
        given.pad,
        given.keeps_scores,
        by_node,
        given.model,
    )
    is_wider = logits_transform.needs_absent and given.num_rows > 1
    return Arrangement(
        logits_transform, logits_transform.stop, LockstepTarget(target, logits_transform) if is_wider else target
    )
