"""A request on its way: its row, its text, and when what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from specdec.decode import Emission
from specdec.grammar.row import finish_reason
from specdec.interfaces import Row
from specdec.rng import PhiloxRng
from specdec.serving.handle import Handle
from specdec.serving.per_request import RowSettings, transform_for
from specdec.serving.request import Completion, Delta, FinishReason, RequestSettings, TokenLogprobs
from specdec.serving.text import AnswerText


@dataclass(slots=True, eq=False)
class Job:
    """One request between submit and its end; it survives being preempted."""

    row: Row
    settings: RequestSettings
    completion: Completion
    handle: Handle
    text: AnswerText
    stop_ids: frozenset[int]
    submitted_at: float
    is_cancelled: bool = False
    drafts: bool = field(init=False)
    has_run: bool = False
    num_passed: int = 0  # times that a later request was let in before it
    _num_read: int = field(init=False)  # tokens of the row that the text has
    _new_text: str = ""

    def __post_init__(self) -> None:
        self._num_read = self.row.num_prompt
        self.drafts = self.settings.draft

    @property
    def rank(self) -> tuple[float, int]:
        """Who runs first: the lowest. Being passed over counts, so that nobody waits for ever."""
        return -(self.settings.priority + self.num_passed // 8), self.row.key

    def row_settings(self) -> RowSettings:
        """What the decode loop asks about the row."""
        transform = transform_for(self.settings.params, self.settings.logits_processors)
        return RowSettings(transform, PhiloxRng(self.completion.seed), self.drafts, self.ends)

    def ends(self, row: Row) -> bool:
        """Whether the row ends with its newest token."""
        self._read()
        return row.tokens[-1] in self.stop_ids or self.text.is_stopped

    def delta(self, emission: Emission, now: float) -> Delta:
        """What the row got in one pass."""
        self._read()
        step = emission.step
        if not self.completion.first_token_s:
            self.completion.first_token_s = now - self.submitted_at
        reason = self._reason() if step.finished else None
        if reason:
            self._new_text += self.text.end()
            self.completion.total_s = now - self.submitted_at
        text, self._new_text = self._new_text, ""
        return Delta(step.tokens, text, step, self._logprobs(emission), reason)

    def _read(self) -> None:
        new = self.row.tokens[self._num_read :]
        self._num_read = len(self.row.tokens)
        self._new_text += self.text.push(new)

    def _reason(self) -> FinishReason:
        if self.row.grammar is not None:
            # A stop string leaves a text that lacks it, and so may not be whole even where the grammar could end.
            is_stop = finish_reason(self.row, tuple(self.stop_ids)) == "stop" and not self.text.is_stopped
        else:
            is_stop = self.row.tokens[-1] in self.stop_ids or self.text.is_stopped
        return FinishReason.STOP if is_stop else FinishReason.LENGTH

    def _logprobs(self, emission: Emission) -> tuple[TokenLogprobs, ...]:
        count = self.settings.logprobs
        if count is None:
            return ()
        nodes: Sequence[int] = emission.step.nodes
        logprobs = emission.scores.logits[list(nodes)].float().log_softmax(-1)
        tokens = torch.tensor(emission.step.tokens, device=logprobs.device)
        own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        if not count:
            return tuple(map(TokenLogprobs, own))
        best = logprobs.topk(count)
        tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(TokenLogprobs(value, tuple(zip(*top, strict=True))) for value, top in zip(own, tops, strict=True))
