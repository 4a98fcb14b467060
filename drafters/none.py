"""No drafter: trees of one node, which is plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree


@dataclass(frozen=True, slots=True)
class NoDrafter(Drafter):
    """Proposes nothing: the baseline of every comparison, in the same loop."""

    name: str = "none"

    def begin(self, rows: Sequence[Row]) -> None: ...

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        return [TokenTree.root(row.tokens[-1]) for row in rows]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None: ...

    def end(self, rows: Sequence[Row]) -> None: ...


def build(context: DraftContext) -> Drafter:
    """No options."""
    return NoDrafter(**context.options)
