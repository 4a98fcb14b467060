"""Whether two methods emitted the same tokens, and if not, whether rounding explains it.

Two ways to compute the same logits differ in their last bits, so where two tokens are nearly as good either may win.
A difference counts as explained only if the target itself, run by transformers over prompt and common prefix, puts both
tokens within a tolerance of its best one: in one forward, or in 16 bits in a forward whose last tokens come as a block,
since that alone moves logits by more than the tolerance now and then (docs/log.md).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.constraints import GrammarState
from specdec.grammar.masks import masked
from specdec.grammar.row import RowGrammar
from specdec.rng import PhiloxRng
from specdec.sampling import SamplingParams, sampling_probs

# On the scale of logits. 16-bit passes of one token and of many differ by up to two steps of a logit's last bits.
_BLOCKS = (2, 4, 8, 16)  # tokens in the last pass of a 16-bit model, as verification has them
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where an output leaves the one that it is compared with."""

    question_id: str
    turn: int
    position: int  # among the new tokens, from 0
    expected: int | None  # token ids; None where one output is already over
    got: int | None
    margin: float | None  # how far the worse of the two tokens lies below the target's best; None: a token is
    # missing or impossible
    is_explained: bool


@dataclass(slots=True)
class Match:
    """Counts over outputs; one of them is what one method made of one turn of one question."""

    compared_with: str | None  # a method; None: nothing can be compared
    identical: int = 0
    total: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def explained(self) -> int:
        return sum(d.is_explained for d in self.differences)

    @property
    def unexplained(self) -> int:
        return len(self.differences) - self.explained

    def as_dict(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "total": self.total,
            "explained": self.explained,
            "unexplained": self.unexplained,
            "compared_with": self.compared_with,
            "differences": [asdict(d) for d in self.differences],
        }


@dataclass(frozen=True, slots=True)
class Judge:
    """Decides whether a difference is rounding."""

    model: Any
    params: SamplingParams
    seed: int
    grammar: GrammarState | None = None  # of an empty text; what all outputs keep to

    @property
    def tolerance(self) -> float:
        return TOLERANCES.get(self.model.dtype, TOLERANCES[torch.bfloat16])

    def compare(
        self, prompt: Sequence[int], key: int, expected: Sequence[int], got: Sequence[int], question_id: str, turn: int
    ) -> Difference | None:
        """The first difference of two outputs, or None if they are identical."""
        if tuple(expected) == tuple(got):
            return None
        place = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
        if place is None:  # one stops where the other goes on: no token was chosen differently
            place = min(len(expected), len(got))
            wanted, other = (ids[place] if place < len(ids) else None for ids in (expected, got))
            return Difference(question_id, turn, place, wanted, other, None, False)
        ids, pair = [*prompt, *expected[:place]], (expected[place], got[place])
        margin = self._margin(self._masked(self._logits(ids), expected[:place]), ids, key, pair)
        if margin > self.tolerance and self.model.dtype in (torch.bfloat16, torch.float16):
            blocks = (self._block_logits(ids, size) for size in _BLOCKS if size < len(ids))
            allowed = (self._masked(logits, expected[:place]) for logits in blocks)
            margin = min([margin, *(self._margin(logits, ids, key, pair) for logits in allowed)])
        finite_margin = margin if math.isfinite(margin) else None
        return Difference(
            question_id, turn, place, expected[place], got[place], finite_margin, margin <= self.tolerance
        )

    def _masked(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        """``logits`` (V,) without what the grammar excludes behind ``text``."""
        return logits if self.grammar is None else masked(RowGrammar(self.grammar.fork(), 0).at(text), logits)

    def _margin(self, logits: Tensor, ids: list[int], key: int, pair: tuple[int, int]) -> float:
        """How far the worse of two tokens lies below the best by ``logits`` (V,)."""
        scores = self._scores(logits, ids, key)
        return float(scores.max() - scores[list(pair)].min())

    def _scores(self, logits: Tensor, ids: list[int], key: int) -> Tensor:
        """(V,) what the next token is the largest of, on the scale of logits: with sampling, noise included."""
        if self.params.is_greedy:
            return logits
        rng = PhiloxRng(self.seed).at(key, len(ids))
        probs = sampling_probs(logits, self.params)
        gumbel = rng.gumbel(torch.arange(len(probs), device=probs.device), 0)
        return self.params.temperature * (probs.double().log() + gumbel)

    @torch.no_grad()
    def _logits(self, ids: list[int]) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=self.model.device), "use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = 1
        logits: Tensor = self.model(**inputs).logits[0, -1]
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.no_grad()
    def _block_logits(self, ids: list[int], size: int) -> Tensor:
        """(V,) behind ``ids`` with the last ``size`` of them in a pass of their own."""
        device = self.model.device
        before, block = (torch.tensor([part], device=device) for part in (ids[:-size], ids[-size:]))
        cache = self.model(input_ids=before, use_cache=True).past_key_values
        logits: Tensor = self.model(input_ids=block, past_key_values=cache, use_cache=True).logits[0, -1]
        return logits.float()
