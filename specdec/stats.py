"""Acceptance statistics under the names that vLLM uses, added up from steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdec.interfaces import Step


@dataclass(slots=True)
class Stats:
    """Counts of one run. A draft is one verification of one row; an empty draft counts, so that
    ``mean_acceptance_length`` is the number of tokens a row gains in one pass of the target (plain decoding: 1).
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0  # nodes of all trees without roots
    num_accepted_tokens: int = 0  # of those that were emitted
    num_tokens: int = 0  # emitted, the target's own included
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)  # [i]: drafts with more than i accepted
    acceptance_histogram: list[int] = field(default_factory=list)  # [i]: drafts with exactly i accepted
    draft_s: float = 0.0
    score_s: float = 0.0
    verify_s: float = 0.0

    def add(self, step: Step) -> None:
        """Count one row's share of one pass."""
        accepted = step.num_accepted
        self.num_drafts += 1
        self.num_draft_tokens += step.num_drafted
        self.num_accepted_tokens += accepted
        self.num_tokens += len(step.tokens)
        self.draft_s += step.draft_s
        self.score_s += step.score_s
        self.verify_s += step.verify_s
        _grow(self.num_accepted_tokens_per_pos, accepted)
        for i in range(accepted):
            self.num_accepted_tokens_per_pos[i] += 1
        _grow(self.acceptance_histogram, accepted + 1)
        self.acceptance_histogram[accepted] += 1

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / drafts: tokens per pass, the target's own token included; 1.0 for an empty run."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens. A tree's rate divides by its nodes: never compare it with a chain's."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_rate_per_pos(self) -> list[float]:
        """[i]: share of drafts with more than i accepted tokens (unconditional)."""
        return [n / self.num_drafts for n in self.num_accepted_tokens_per_pos]

    def as_dict(self) -> dict[str, Any]:
        """All counts and ratios, ready for JSON."""
        return {
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "num_tokens": self.num_tokens,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "accepted_per_pos": self.num_accepted_tokens_per_pos,
            "acceptance_histogram": self.acceptance_histogram,
            "draft_s": self.draft_s,
            "score_s": self.score_s,
            "verify_s": self.verify_s,
        }


def _grow(counts: list[int], length: int) -> None:
    counts.extend([0] * (length - len(counts)))
