"""Production code that draws or joins trees declares the truth: with it too the text keeps the target's law, by enumeration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from enumeration import Loop
from exact_cases import TOLERANCE
from growing import SHAPES, GrowingDrafter, error
from torch import Tensor
from toy import (
    CERTAIN,
    FILL_UP,
    INDEPENDENT,
    LEAF,
    TOP_PLUS_ONE,
    UNBALANCED,
    WITHOUT_REPLACEMENT,
    Kind,
    Shape,
    ToyDrafter,
    ToyTarget,
    chain,
    full,
)

from specdec.drafters import hybrid
from specdec.drafters.trees.expansion import ChildSampling
from specdec.drafters.trees.merge import merge
from specdec.interfaces import Limit, Row, Scores, Verdict
from specdec.rng import Rng, RowRng, Stream
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import make_verifier


@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("children", [c for c in ChildSampling if c is not ChildSampling.COUPLED], ids=str)
@pytest.mark.parametrize("max_nodes", [3, 6])
def test_grown_trees_declare_what_was_drawn(children: ChildSampling, shape: str, verifier: str, max_nodes: int) -> None:
    """Guards nodes dropped for their own probability, and distributions other than those that were drawn from."""
    loop = Loop(GrowingDrafter(children, SHAPES[shape]), make_verifier(verifier), ToyTarget(3), max_nodes=max_nodes)
    assert error(loop) <= TOLERANCE


@dataclass(frozen=True, slots=True)
class OtherNoise:
    """The same noise for another purpose: two drafters must not draw by the same numbers."""

    rng: Rng

    def at(self, row: int, position: int) -> OtherRowNoise:
        return OtherRowNoise(self.rng.at(row, position))


@dataclass(frozen=True, slots=True)
class OtherRowNoise:
    """One row's share of :class:`OtherNoise`."""

    rng: RowRng

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        return self.rng.draw(probs, depth, stream, index + 100)


@dataclass(slots=True)
class MergingDrafter:
    """Merges what two drafters propose."""

    first: ToyDrafter
    second: ToyDrafter
    name: str = "merging"

    def begin(self, rows: Sequence[Row]) -> None:
        self.first.begin(rows)
        self.second.begin(rows)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        first = self.first.propose(rows, limits, params, rng)
        second = self.second.propose(rows, limits, params, OtherNoise(rng))  # type: ignore[arg-type]
        return [merge(pair) for pair in zip(first, second, strict=True)]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None: ...

    def end(self, rows: Sequence[Row]) -> None:
        self.first.end(rows)
        self.second.end(rows)


DEEP_YOUNGER: Shape = (LEAF, chain(1))
PAIRS: list[tuple[tuple[Kind, Shape], tuple[Kind, Shape]]] = [
    ((CERTAIN, UNBALANCED), (INDEPENDENT, full(2))),
    ((INDEPENDENT, UNBALANCED), (CERTAIN, full(2, 1))),
    ((INDEPENDENT, chain(2)), (INDEPENDENT, chain(2))),
    ((WITHOUT_REPLACEMENT, full(2)), (WITHOUT_REPLACEMENT, DEEP_YOUNGER)),
    ((TOP_PLUS_ONE, UNBALANCED), (WITHOUT_REPLACEMENT, DEEP_YOUNGER)),
    ((FILL_UP, full(2)), (TOP_PLUS_ONE, UNBALANCED)),
]


def pair_id(pair: tuple[tuple[Kind, Shape], tuple[Kind, Shape]]) -> str:
    return " and ".join(f"{kind.name} {shape}" for kind, shape in pair)


@pytest.mark.parametrize("verifier", ["match", "rejection", "traversal"])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_merged_trees_are_as_exact_as_their_parts(
    pair: tuple[tuple[Kind, Shape], tuple[Kind, Shape]], verifier: str
) -> None:
    """Guards drawn nodes that vanish in the union: each is an attempt that changes what later ones are compared with."""
    first, second = (ToyDrafter(*part, seed=11 + i) for i, part in enumerate(pair))
    assert error(Loop(MergingDrafter(first, second), make_verifier(verifier), ToyTarget(2))) <= TOLERANCE


PARTS: dict[str, list[tuple[ChildSampling, str, int]]] = {
    "picked + picked": [(ChildSampling.CERTAIN, "2x1", 13), (ChildSampling.CERTAIN, "chain", 14)],
    "picked + drawn": [(ChildSampling.CERTAIN, "2x1", 13), (ChildSampling.WITHOUT_REPLACEMENT, "2x1", 14)],
    "drawn + drawn": [(ChildSampling.INDEPENDENT, "2x1", 13), (ChildSampling.INDEPENDENT, "2x1", 14)],
    "drawn + drawn + picked": [
        (ChildSampling.TOP_PLUS_ONE, "2x1", 13),
        (ChildSampling.WITHOUT_REPLACEMENT, "chain", 14),
        (ChildSampling.CERTAIN, "2x1", 15),
    ],
}


@pytest.mark.parametrize("verifier", ["match", "rejection", "traversal", "block"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("max_nodes", [2, 3, 6])
def test_a_hybrid_of_any_parts_keeps_the_law(
    parts: str, verifier: str, max_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards drawn trees chosen or dropped for what they hold, and parts that draw with the same random numbers."""
    monkeypatch.setattr(hybrid, "_learn", lambda *_: None)  # every branch of a step must meet the same drafter
    made = [GrowingDrafter(children, SHAPES[shape], seed=seed) for children, shape, seed in PARTS[parts]]
    loop = Loop(hybrid.HybridDrafter(made), make_verifier(verifier), ToyTarget(3), max_nodes=max_nodes)
    assert error(loop) <= TOLERANCE


def test_a_hybrid_that_keeps_the_more_promising_drawn_chain_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug that choosing between drawn trees by their own probability would be."""
    monkeypatch.setattr(hybrid, "_learn", lambda *_: None)
    monkeypatch.setattr(hybrid, "_combine", lambda trees, _: max(trees, key=lambda tree: sum(tree.estimates)))
    made = [GrowingDrafter(ChildSampling.INDEPENDENT, SHAPES["chain"], seed=seed) for seed in (13, 14)]
    loop = Loop(hybrid.HybridDrafter(made), make_verifier("rejection"), ToyTarget(3))
    assert error(loop) > 1e-3
