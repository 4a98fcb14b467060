"""Production tree growth over a lookup table, and how far a loop is from the target's law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from enumeration import Loop, exact_joint, stepwise_joint, total_variation
from torch import Tensor
from toy import PROMPT, table

from specdec.drafters.trees import growth
from specdec.drafters.trees.expansion import ChildSampling
from specdec.drafters.trees.growth import TreeBuilder
from specdec.drafters.trees.shapes import StaticShape
from specdec.interfaces import Drafter, Limit, Row, Scores, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree


def error(loop: Loop, num_tokens: int = 3) -> float:
    return total_variation(stepwise_joint(loop, num_tokens), exact_joint(loop.target, PROMPT, num_tokens))


@dataclass(slots=True)
class GrowingDrafter(Drafter):
    """The growth of specdec.drafters.trees.growth over a lookup table instead of a model."""

    children: ChildSampling
    shape: growth.Shape
    vocab: int = 3
    name: str = "growing"
    seed: int = 13
    logits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.logits = table(self.seed, self.vocab, spread=1.0, holes=4)

    @property
    def is_drawing(self) -> bool:
        return self.children is not ChildSampling.CERTAIN

    def begin(self, rows: Sequence[Row]) -> None: ...

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        trees = []
        for row, limit in zip(rows, limits, strict=True):
            here = rng.at(row.key, len(row.tokens))
            builders = TreeBuilder(row, limit, self.shape, self.children, params, here)
            while builders.frontier:
                builders.expand(self.logits[[self._context(builders, node) for node in builders.frontier]])
            trees.append(builders.proposal())
        return trees

    def _context(self, builders: TreeBuilder, node: int) -> int:
        parent = builders.parents[node]
        before = builders.row.tokens[-2] if parent < 0 else builders.tokens[parent]
        return before * self.vocab + builders.tokens[node]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None: ...

    def end(self, rows: Sequence[Row]) -> None: ...


SHAPES = {
    "chain": growth.Shape((1, 1, 1)),
    "unsure chain": growth.Shape((1, 1, 1), min_confidence=0.3),
    "2x1": growth.Shape((2, 1)),
    "3x2": growth.Shape((3, 2)),
    "best-first": growth.Shape((), top_k=2, depth=2),
    "static": growth.Shape(static=StaticShape(((0,), (1,), (1, 0)))),
}
