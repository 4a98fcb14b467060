"""The rows of one call of ``generate()``: what goes in as a padded tensor comes out as one."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.decode import Emission
from specdec.distributions import NodeDistributions
from specdec.generation.streaming import Stream
from specdec.grammar.compiler import end_tokens
from specdec.grammar.row import finish_reason
from specdec.interfaces import Row
from specdec.stats import Stats


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """What ``generate()`` returns with ``return_dict_in_generate``, the acceptance statistics, and why each row ended.

    A finish reason is "stop" (a token or a criterion that ends a text), "length" (no more tokens were allowed), or
    "incomplete" (a criterion ended the row inside what its grammar asks for). Under a grammar, "stop" alone says that
    the text is whole.
    """

    stats: Stats | None = None
    finish_reasons: tuple[str, ...] | None = None


@dataclass(slots=True)
class Batch:
    """The rows of one call: what goes in as a padded tensor comes out as one."""

    input_ids: Tensor  # (B, L)
    padding: list[int]  # (B,) masked tokens on the left
    config: Any
    criteria: Sequence[Any]
    stream: Stream
    rows: list[Row] = field(init=False)
    padding_tokens: dict[int, list[int]] = field(init=False)
    _num_streamed: int = 0
    _finished: set[int] = field(default_factory=set)
    _reasons: dict[int, str] = field(default_factory=dict)  # by row; told when it ends, because padding may follow
    _logits: list[list[Tensor]] = field(init=False)  # for each row and new token (V,)
    _scores: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        num_new = _num_new_tokens(self.input_ids.shape[1], self.config, self.criteria)
        tokens = self.input_ids.tolist()
        self.padding_tokens = {i: t[:n] for i, (t, n) in enumerate(zip(tokens, self.padding, strict=True))}
        self.rows = [
            Row(i, t[n:], len(t) - n + num_new) for i, (t, n) in enumerate(zip(tokens, self.padding, strict=True))
        ]
        are_padded = any(hasattr(c, "eos_token_id") for c in self.criteria)
        if are_padded and self.config._pad_token_tensor is None and len(tokens) > 1:
            raise ValueError("rows that end before others are filled with pad_token_id, which is not set; pass it")
        self._logits = [[] for _ in tokens]
        self._scores = [[] for _ in tokens]

    def begin(self) -> None:
        """Show the prompts to the stream."""
        self.stream.put_prompt(self.input_ids)

    def collect(self, emission: Emission) -> None:
        """Stream what every row has reached, and keep logits if they were asked for."""
        row, nodes = emission.row.key, emission.step.nodes
        if emission.step.finished:
            self._finished.add(row)
            self._reasons[row] = finish_reason(emission.row, end_tokens(self.config._eos_token_tensor))
        if self.config.return_dict_in_generate and self.config.output_logits:
            self._logits[row] += [self._kept(emission.scores.logits[node]) for node in nodes]
        if self.config.return_dict_in_generate and self.config.output_scores:
            assert isinstance(emission.probs, NodeDistributions)
            self._scores[row] += [self._kept(emission.probs.scores(node)) for node in nodes]
        if self.stream.is_open:
            self._stream()

    def _kept(self, scores: Tensor) -> Tensor:
        """A copy (V,) as generate() returns it; a view would keep everything that the pass computed."""
        return scores.to(self.input_ids.device, torch.float32, copy=True)

    def _stream(self) -> None:
        columns = min([self._num_new, *(r.num_emitted for r in self.rows if r.key not in self._finished)])
        for i in range(self._num_streamed, columns):
            column = [r.tokens[r.num_prompt + i] if i < r.num_emitted else self._pad for r in self.rows]
            self.stream.put(torch.tensor(column))
        self._num_streamed = max(columns, self._num_streamed)

    @property
    def _num_new(self) -> int:
        return max(row.num_emitted for row in self.rows)

    @property
    def _pad(self) -> int:
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    def result(self, stats: Stats) -> Any:
        num_new = self._num_new
        new = [(r.tokens[r.num_prompt :] + [self._pad] * (num_new - r.num_emitted))[:num_new] for r in self.rows]
        sequences = torch.cat([self.input_ids, torch.tensor(new, device=self.input_ids.device)], 1)
        reasons = tuple(self._reasons[row.key] for row in self.rows)
        if not self.config.return_dict_in_generate:
            self._warn(reasons)
            return sequences
        return SpeculativeOutput(
            sequences=sequences,
            scores=_by_step(self._scores, num_new) if self.config.output_scores else None,
            logits=_by_step(self._logits, num_new) if self.config.output_logits else None,
            stats=stats,
            finish_reasons=reasons,
        )

    def _warn(self, reasons: Sequence[str]) -> None:
        """Tell a caller who did not ask for reasons."""
        cut = [row.key for row, reason in zip(self.rows, reasons, strict=True) if row.grammar and reason != "stop"]
        if cut:
            warnings.warn(
                f"the text of row {cut[0]} ended before its grammar was complete: allow more new tokens; with "
                "return_dict_in_generate=True the output says of each row why it ended",
                stacklevel=2,
            )


def _by_step(rows: Sequence[Sequence[Tensor]], num_new: int) -> tuple[Tensor, ...]:
    """For each step (B, V); zeros where a row had ended."""
    blank = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([r[i] if i < len(r) else blank for r in rows]) for i in range(num_new))


def _num_new_tokens(width: int, config: Any, criteria: Sequence[Any]) -> int:
    """How many tokens a row of ``width`` may get; generate() takes one before it asks any criterion."""
    longest: float = min([c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [config.max_length])
    return max(1, math.ceil(min(longest, sys.maxsize)) - width)
