"""A whole drafter in one file: propose the tokens that followed the latest earlier occurrence of the newest token.

It is explained line by line in docs/drafters.md. A package of its own needs this file and one entry point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree


@dataclass(slots=True)
class RepeatDrafter(Drafter):
    """Proposes a chain of at most ``num_tokens`` tokens, copied from the row itself."""

    num_tokens: int = 4
    name: str = "repeat"
    # For each row: token -> where its latest occurrence is followed on. The newest token is not in it yet.
    _after: dict[Row, dict[int, int]] = field(default_factory=dict)

    def begin(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._after[row] = {}
            self._learn(row, 0)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        return [self._draft(row, limit) for row, limit in zip(rows, limits, strict=True)]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        for row in rows:
            self._learn(row, len(row.tokens) - row.num_new - 1)

    def end(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._after.pop(row, None)

    def _learn(self, row: Row, first: int) -> None:
        self._after[row].update((row.tokens[i], i + 1) for i in range(first, len(row.tokens) - 1))

    def _draft(self, row: Row, limit: Limit) -> TokenTree:
        newest = row.tokens[-1]
        start = self._after[row].get(newest, len(row.tokens))
        size = min(self.num_tokens, limit.depth, limit.nodes)
        return TokenTree.chain(newest, row.tokens[start : start + size])


def build(context: DraftContext) -> Drafter:
    """Options: num_tokens."""
    return RepeatDrafter(**context.options)
