"""Ways to draft whose exactness is proved by enumeration; a new one is one line in ``CASES``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from enumeration import Loop, ScriptedNoise, enumerate_outcomes, exact_joint
from torch import Tensor
from toy import (
    ALL_KINDS,
    BY_CONTEXT,
    CERTAIN,
    CERTAIN_FIRST,
    CERTAIN_LAST,
    FILL_UP,
    GROUP_AROUND,
    GROUP_LAST,
    INDEPENDENT,
    LEAF,
    PROMPT,
    TOP_PLUS_ONE,
    TWO_GROUPS,
    TWO_MODELS,
    UNBALANCED,
    UNEVEN,
    WITHOUT_REPLACEMENT,
    Kind,
    Shape,
    ToyDrafter,
    ToyTarget,
    chain,
    full,
)

from specdec.rng import Rng
from specdec.verifiers import make_verifier

TOLERANCE = 1e-12
CHAIN_ONLY: frozenset[str] = frozenset({"block"})  # verifiers that are exact for chains alone


@dataclass(frozen=True, slots=True)
class Case:
    """A way to draft."""

    kind: Kind
    shape: Shape
    min_prob: float = 0.0

    @property
    def is_chain(self) -> bool:
        shape = self.shape
        while len(shape) == 1:
            shape = shape[0]
        return not shape

    def drafter(self, vocab: int = 3) -> ToyDrafter:
        return ToyDrafter(self.kind, self.shape, vocab, self.min_prob)


SHAPES = {"chain": chain(3), "<3>": full(3), "<2,2>": full(2, 2), "unbalanced": UNBALANCED, "uneven": UNEVEN}
PURE = (CERTAIN, INDEPENDENT, WITHOUT_REPLACEMENT, TOP_PLUS_ONE)
MIXED = (TWO_MODELS, TWO_GROUPS, FILL_UP, CERTAIN_FIRST, CERTAIN_LAST, GROUP_LAST, GROUP_AROUND)
CASES = {
    **{f"{kind.name} {name}": Case(kind, shape) for kind in PURE for name, shape in SHAPES.items()},
    **{f"{kind.name} {name}": Case(kind, SHAPES[name]) for kind in MIXED for name in ("<3>", "unbalanced")},
    "group around certain <2,2>": Case(GROUP_AROUND, full(2, 2)),
    "certain last chain below <2>": Case(CERTAIN_LAST, (chain(2), LEAF)),
    "all kinds <4>": Case(ALL_KINDS, full(4)),
    "all kinds <3,1>": Case(ALL_KINDS, full(3, 1)),
    "certain or drawn by context chain": Case(BY_CONTEXT, chain(3)),
    "independent chain while sure": Case(INDEPENDENT, chain(3), min_prob=0.3),
    "without replacement <2,2> while sure": Case(WITHOUT_REPLACEMENT, full(2, 2), min_prob=0.3),
}
SMALL = {
    "certain chain": Case(CERTAIN, chain(2)),
    "certain unbalanced": Case(CERTAIN, UNBALANCED),
    "independent chain": Case(INDEPENDENT, chain(2)),
    "independent <2>": Case(INDEPENDENT, full(2)),
    "two models <2>": Case(TWO_MODELS, full(2)),
    "without replacement unbalanced": Case(WITHOUT_REPLACEMENT, UNBALANCED),
    "top plus one <2>": Case(TOP_PLUS_ONE, full(2)),
    "certain first unbalanced": Case(CERTAIN_FIRST, UNBALANCED),
}


def is_exact(verifier: str, case: Case) -> bool:
    return make_verifier(verifier).lossless and (verifier not in CHAIN_ONLY or case.is_chain)


def greedy_law(logits: Tensor, history: Sequence[int]) -> Tensor:
    return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()


def agreeing(case: Case) -> ToyDrafter:
    """A drafter that draws from the target's own distribution."""
    drafter = case.drafter()
    drafter.tables = [ToyTarget().logits.softmax(-1)] * case.kind.num_tables
    return drafter


def assert_possible(loop: Loop, rng: Callable[[ScriptedNoise], Rng]) -> None:
    outcomes = enumerate_outcomes(lambda draws: loop.generate(rng(draws), 3)[0])
    assert outcomes.keys() <= exact_joint(loop.target, PROMPT, 3).keys()
