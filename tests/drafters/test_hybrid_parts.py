"""Hybrids within hybrids: each part draws by numbers of its own, the limit is divided, and traits must be declared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from enumeration import Loop, NoiseReuseError, ScriptedNoise, enumerate_outcomes, total_variation
from growing import SHAPES as GROWN
from growing import GrowingDrafter, error
from model_law import PROMPT, law
from toy import INDEPENDENT, ToyDrafter, ToyTarget, chain
from trained import random_eagle, tiny_target

from specdec.budget.adaptive import FixedBudget
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters import hybrid, make_drafter
from specdec.drafters.heads.eagle_format import save_eagle
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.expansion import ChildSampling
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import DraftContext, Drafter, Limit, ModelTarget, Row, Target
from specdec.rng import PartNoise, PartRowNoise, PhiloxRng, Rng, Stream
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import make_verifier

TOLERANCE = 1e-12


def builders(seed: int, children: ChildSampling = ChildSampling.INDEPENDENT, shape: str = "chain") -> GrowingDrafter:
    return GrowingDrafter(children, GROWN[shape], seed=seed)


NESTED = {
    "two in one beside one": lambda: HybridDrafter([HybridDrafter([builders(13), builders(14)]), builders(15)]),
    "one beside two in one": lambda: HybridDrafter([builders(15), HybridDrafter([builders(13), builders(14)])]),
    "three deep": lambda: HybridDrafter(
        [
            builders(12, ChildSampling.CERTAIN),
            HybridDrafter([builders(13), HybridDrafter([builders(14), builders(15)])]),
        ]
    ),
    "without replacement": lambda: HybridDrafter(
        [HybridDrafter([builders(13, ChildSampling.WITHOUT_REPLACEMENT, "2x1"), builders(14)]), builders(15)]
    ),
}


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every branch of an enumeration must meet the same drafter."""
    monkeypatch.setattr(hybrid, "_learn", lambda *_: None)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
@pytest.mark.parametrize("max_nodes", [3, 4])
@pytest.mark.parametrize("nested", NESTED)
def test_hybrids_within_hybrids_keep_the_law(nested: str, max_nodes: int, verifier: str) -> None:
    """Guards parts of a part that draw by the numbers of its siblings."""
    loop = Loop(NESTED[nested](), make_verifier(verifier), ToyTarget(3), max_nodes=max_nodes)
    assert error(loop, 2) <= TOLERANCE


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("nested", NESTED)
def test_parts_that_share_their_random_numbers_are_caught(nested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same enumeration, over a hybrid that hands its own noise on."""
    monkeypatch.setattr(PartRowNoise, "_own", lambda self, index: index)
    loop = Loop(NESTED[nested](), make_verifier("rejection"), ToyTarget(3), max_nodes=4)
    with pytest.raises(NoiseReuseError):
        error(loop, 2)


def build_pair(target: CausalLM, folder: Path) -> Drafter:
    """Two draft models, which are a hybrid of their own, beside an EAGLE head; every part draws."""
    save_eagle(random_eagle(target.model, [0, 2]), folder)
    drafts = tuple(tiny_target(3, layers=n, size=8, dtype=torch.float64) for n in (1, 2))
    spec = f"hybrid:parts=model+eagle,model.num_tokens=1,model.min_confidence=0.0,eagle.shape=chain,eagle.path={folder}"
    return make_drafter(spec, DraftContext(target, make_verifier("rejection"), drafts))


def pair_error(folder: Path, num_tokens: int = 3) -> float:
    """The distance between the joint distribution of whole runs with ``build_pair`` and the target's own."""
    model = tiny_target(3, layers=3, size=8, dtype=torch.float64)
    target = CausalLM(model)
    drafter = build_pair(target, folder)

    def run(rng: Rng) -> tuple[int, ...]:
        row = Row(0, list(PROMPT), len(PROMPT) + num_tokens)
        rule, logits_transform = make_verifier("rejection"), WarperTransform(SamplingParams())
        for _ in Decoder(target, drafter, rule, logits_transform, rng, lambda row: False, FixedBudget(4)).run([row]):
            pass
        return tuple(row.tokens[len(PROMPT) :])

    return total_variation({**enumerate_outcomes(run)}, law(model, num_tokens))


@pytest.mark.usefixtures("forgetful")
@pytest.mark.slow
def test_two_draft_models_beside_an_eagle_head_keep_the_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the case in which ``model`` is a hybrid itself; with shared numbers the same test fails."""
    assert pair_error(tmp_path) <= 1e-6
    monkeypatch.setattr(PartRowNoise, "_own", lambda self, index: index)
    with pytest.raises(NoiseReuseError):
        pair_error(tmp_path)


@pytest.mark.parametrize("num_nodes", range(10))
def test_the_limit_is_divided_at_every_depth(num_nodes: int, tmp_path: Path) -> None:
    """Guards drawn trees that are kept whole and do not fit beside each other."""
    sizes: list[int] = []

    @dataclass(slots=True, eq=False)
    class Weighed(GrowingDrafter):
        def propose(self, *args: Any) -> list[TokenTree]:
            trees = GrowingDrafter.propose(self, *args)
            sizes.append(len(trees[0]) - 1)
            return trees

    def part(seed: int) -> Drafter:
        return Weighed(ChildSampling.INDEPENDENT, GROWN["3x2"], seed=seed)

    nested = HybridDrafter([HybridDrafter([part(1), part(2)]), part(3)])
    row = Row(0, [0, 1], 30)
    nested.begin([row])
    (tree,) = nested.propose([row], [Limit(9, num_nodes)], SamplingParams(), PhiloxRng(0))
    assert sizes == [num_nodes // 4, num_nodes // 4, num_nodes // 2]
    assert len(tree) - 1 == sum(sizes)

    target = CausalLM(tiny_target(3, layers=3, size=8, dtype=torch.float64))
    pair, row = build_pair(target, tmp_path), Row(0, [0, 1, 2], 30)
    pair.begin([row])
    (tree,) = pair.propose([row], [Limit(9, num_nodes)], SamplingParams(), PhiloxRng(0))
    assert pair.is_drawing
    assert pair.drafts_by_level
    assert len(tree) - 1 == 2 * min(1, num_nodes // 4), "an EAGLE head drafts nothing in the first step"


def test_no_two_parts_at_any_depth_share_an_index_and_all_share_the_targets_choice() -> None:
    rng, probs = ScriptedNoise([]), torch.full((4,), 0.25)
    leaves = [
        PartNoise(rng, 0, 3),
        PartNoise(rng, 1, 3),
        *(PartNoise(PartNoise(rng, 2, 3), k, 2) for k in (0,)),
        *(PartNoise(PartNoise(PartNoise(rng, 2, 3), 1, 2), k, 4) for k in range(4)),
    ]
    for leaf in leaves:
        for index in range(20):
            leaf.at(0, 5).draw(probs, 0, Stream.DRAFT, index)
        leaf.at(0, 5).sample_without_replacement(probs, 2, 0, 20)
    real = PhiloxRng(3)
    for part in (PartNoise(real, 1, 3), PartNoise(PartNoise(real, 1, 2), 1, 2)):
        here, there = part.at(0, 5), real.at(0, 5)
        assert here.draw(probs, 1) == there.draw(probs, 1)
        assert torch.equal(here.gumbel(torch.arange(4), 1), there.gumbel(torch.arange(4), 1))


@dataclass(slots=True)
class Bare:
    """A drafter as another package may have written it: a name, four methods, and no traits."""

    name: str = "bare"
    inner: NoDrafter = field(default_factory=NoDrafter)

    def begin(self, rows: Sequence[Row]) -> None: ...
    def propose(self, *args: Any) -> list[TokenTree]:
        return self.inner.propose(*args)

    def observe(self, *args: Any) -> None: ...
    def end(self, rows: Sequence[Row]) -> None: ...


def test_a_part_without_traits_is_refused_and_alone_it_works() -> None:
    """Guards guesses: whether a drafter draws decides on the text's distribution."""
    with pytest.raises(
        ValueError, match=r"'bare' must declare drafts_by_level and is_drawing.*specdec\.interfaces\.Drafter"
    ):
        HybridDrafter([Bare(), NoDrafter()])  # type: ignore[list-item]
    loop = Loop(Bare(), make_verifier("match"))  # type: ignore[arg-type]
    assert len(loop.generate(PhiloxRng(0), 3)[0]) == 3


def test_a_part_that_draws_without_saying_so_is_refused() -> None:
    """Guards drawn nodes that are cut for what they are."""

    class Quiet(ToyDrafter, Drafter):
        is_drawing = False

    parts = [Quiet(INDEPENDENT, chain(2)), NoDrafter()]
    with pytest.raises(ValueError, match="'toy' draws nodes, so its is_drawing must be True"):
        Loop(HybridDrafter(parts), make_verifier("rejection")).generate(PhiloxRng(0), 4)


def test_our_drafters_declare_what_they_do() -> None:
    """A drafter that inherits the defaults draws nothing and is cheap."""
    assert (NoDrafter().drafts_by_level, NoDrafter().is_drawing) == (False, False)
    made = make_drafter("ngram", DraftContext(ToyTarget(), make_verifier("match")))
    assert (made.drafts_by_level, made.is_drawing) == (False, False)


def test_an_engine_is_a_model_target_and_a_table_is_none() -> None:
    """What trained heads ask of their target is a protocol, which other engines may keep as well."""
    engine: Target = CausalLM(tiny_target())
    assert isinstance(engine, ModelTarget)
    assert not isinstance(ToyTarget(), ModelTarget)
