"""Trained drafters with random heads keep the text exact: by enumeration on a tiny real model, and against generate()."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from enumeration import enumerate_outcomes, total_variation
from model_law import PROMPT, law
from torch import Tensor
from trained import random_eagle, random_feature_cell, random_medusa, tiny_target
from transformers import LlamaForCausalLM

import specdec
from specdec.budget.adaptive import FixedBudget
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters import make_drafter
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.heads.eagle_engine import EagleEngine
from specdec.drafters.heads.eagle_format import save_eagle
from specdec.drafters.heads.medusa_heads import save_medusa
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.trees.expansion import ChildSampling, Shape
from specdec.drafters.trees.growth import TreeBuilder
from specdec.engine.causal_lm import CausalLM
from specdec.errors import UnsupportedModelError
from specdec.interfaces import DraftContext, Drafter, Row
from specdec.rng import PhiloxRng, Rng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import Draw, TokenTree
from specdec.verifiers import make_verifier

TOLERANCE = 1e-6  # norms of the target run in float32, so that its own logits differ by 1e-7 between passes
PAIR = Shape((2, 1))


def error(make: Callable[[CausalLM], Drafter], verifier: str, num_tokens: int = 3) -> float:
    """The distance between the exact distribution of whole runs of the loop and the target's own."""
    model = tiny_target(3, layers=3, size=8, dtype=torch.float64)
    target = CausalLM(model)

    def run(rng: Rng) -> tuple[int, ...]:
        row = Row(0, list(PROMPT), len(PROMPT) + num_tokens)
        logits_transform = WarperTransform(SamplingParams())
        rule = make_verifier(verifier)
        for _ in Decoder(target, drafter, rule, logits_transform, rng, lambda row: False, FixedBudget(8)).run([row]):
            pass
        return tuple(row.tokens[2:])

    drafter = make(target)
    return total_variation({**enumerate_outcomes(run)}, law(model, num_tokens))


def eagle(shape: Shape, children: ChildSampling, seed: int = 1) -> Callable[[CausalLM], EagleDrafter]:
    return lambda t: EagleDrafter(EagleEngine(random_eagle(t.model, [0, 2], seed), t), shape, children)


def medusa(target: CausalLM) -> MedusaDrafter:
    return MedusaDrafter(random_medusa(target.model, [0, 2], num_heads=2), target)


PAIRS: dict[str, tuple[Callable[[CausalLM], Drafter], str]] = {
    "certain match": (eagle(Shape((), 2, 2), ChildSampling.CERTAIN), "match"),
    "certain rejection": (eagle(Shape((), 2, 2), ChildSampling.CERTAIN), "rejection"),
    "chain rejection": (eagle(Shape((1, 1)), ChildSampling.INDEPENDENT), "rejection"),
    "chain block": (eagle(Shape((1, 1)), ChildSampling.INDEPENDENT), "block"),
    "independent traversal": (eagle(PAIR, ChildSampling.INDEPENDENT), "traversal"),
    "without replacement rejection": (eagle(PAIR, ChildSampling.WITHOUT_REPLACEMENT), "rejection"),
    "without replacement traversal": (eagle(PAIR, ChildSampling.WITHOUT_REPLACEMENT), "traversal"),
    "top plus one rejection": (eagle(PAIR, ChildSampling.TOP_PLUS_ONE), "rejection"),
    "medusa match": (medusa, "match"),
    "medusa rejection": (medusa, "rejection"),
    "hybrid rejection": (lambda t: HybridDrafter([eagle(PAIR, ChildSampling.INDEPENDENT)(t), medusa(t)]), "rejection"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_joint_distribution_of_several_tokens_is_the_targets(pair: str) -> None:
    """The draft vocabulary lacks a token that the target emits: its draft probability must be 0, not absent."""
    assert error(*PAIRS[pair]) <= TOLERANCE


def test_the_enumeration_sees_probabilities_that_were_not_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that draws from one distribution and declares another."""
    remember = TreeBuilder._remember

    def flattened(self: TreeBuilder, probs: Tensor, draw: Draw) -> None:
        remember(self, probs.sqrt() / probs.sqrt().sum(), draw)

    monkeypatch.setattr(TreeBuilder, "_remember", flattened)
    assert error(*PAIRS["chain rejection"]) > 1e-3


# ---- against generate() ----


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_target()


@pytest.fixture(scope="module")
def heads(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads")
    save_eagle(random_eagle(model, list(range(0, 61, 2))), path / "eagle")
    medusa_heads = random_medusa(model, list(range(0, 61, 3)))
    save_medusa(medusa_heads, path / "medusa")
    medusa_heads.accuracies = ((0.4, 0.2, 0.1), (0.3, 0.1, 0.1), (0.2, 0.1, 0.05))
    save_medusa(medusa_heads, path / "static")
    return path


DRAFTERS = [
    "eagle:path={}/eagle", "eagle:path={}/eagle,shape=chain,num_tokens=3", "eagle:path={}/eagle,shape=3x2x1",
    "medusa:path={}/medusa", "medusa:path={}/static", "medusa:path={}/static,choices=dynamic,children=certain",
    "hybrid:parts=ngram+eagle,eagle.path={}/eagle", "hybrid:parts=medusa+eagle,eagle.path={0}/eagle,medusa.path={0}/static",
]  # fmt: skip


def batch() -> dict[str, Tensor]:
    rows = [[5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8, 9], [30]]
    ids = torch.tensor([[0] * (8 - len(row)) + row for row in rows])
    return {"inputs": ids, "attention_mask": (torch.arange(8) >= torch.tensor([[8 - len(row)] for row in rows])).long()}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_tokens_equal_generate(model: LlamaForCausalLM, heads: Path, drafter: str) -> None:
    expected = model.generate(**batch(), max_new_tokens=16, do_sample=False)
    drafter = drafter.format(heads)
    for adaptive in (True, False):
        found = specdec.generate(
            model, **batch(), drafter=drafter, adaptive=adaptive, max_new_tokens=16, do_sample=False
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampled_tokens_are_those_of_plain_decoding_with_the_seed(
    model: LlamaForCausalLM, heads: Path, drafter: str
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": True, "top_k": 20, "seed": 5}
    expected = specdec.generate(model, **batch(), drafter="none", **options)
    found = specdec.generate(model, **batch(), drafter=drafter.format(heads), adaptive=False, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("drafter", ["medusa", "eagle"])
def test_without_a_head_for_this_target_the_error_says_how_to_train_one(model: LlamaForCausalLM, drafter: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"specdec train {drafter} --target"):
        specdec.generate(model, **batch(), drafter=drafter, max_new_tokens=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("medusa:path={}/medusa,choices=static", "hold no measured choices"),
        ("medusa:path={}/medusa,choices=best", "choices must be one of static, dynamic"),
        ("medusa:path={}/medusa,children=independent", "certain or coupled"),
        ("eagle:path={}/eagle,children=all", "children must be one of"),
        ("eagle:path={}/eagle,shape=round", "shape must be"),
        ("eagle:path={}/eagle,depth=3", "does not take these options"),
    ],
)
def test_wrong_options_are_named(model: LlamaForCausalLM, heads: Path, text: str, message: str) -> None:
    context = DraftContext(CausalLM(model), make_verifier("rejection"))
    with pytest.raises(ValueError, match=message):
        make_drafter(text.format(heads), context)


def test_parts_of_a_hybrid_get_the_layers_that_they_asked_for(model: LlamaForCausalLM) -> None:
    """One pass captures for all: a second head must not read the first one's layers."""
    target = CausalLM(model)
    target.request(layers=(1, 4))
    target.request(layers=(2, 2, 4), hidden=True)
    row = Row(0, [5, 6, 7, 8], 9)
    target.open([row])
    scores = target.score([row], [TokenTree.root(8)])[0]
    with torch.no_grad():
        states = model(torch.tensor([row.tokens]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[2][0], states[2][0], states[4][0]], -1)
    torch.testing.assert_close(target.features(scores, (2, 2, 4)), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.hidden, states[-1][0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="not asked for"):
        target.features(scores, (3,))


def test_eagle_1_heads_use_the_targets_output_matrix(model: LlamaForCausalLM) -> None:
    target = CausalLM(model)
    drafter = EagleDrafter(EagleEngine(random_feature_cell(model, 2), target), Shape((), 3, 3))
    rows = [Row(0, [5, 9, 12, 7], 20)]
    rule, logits_transform = make_verifier("match"), WarperTransform(GREEDY)
    for _ in Decoder(target, drafter, rule, logits_transform, PhiloxRng(0), lambda row: row.tokens[-1] == 2).run(rows):
        pass
    expected = model.generate(torch.tensor([[5, 9, 12, 7]]), max_new_tokens=16, do_sample=False)
    assert rows[0].tokens == expected[0].tolist()


@pytest.mark.parametrize("make", [medusa, eagle(PAIR, ChildSampling.CERTAIN)], ids=["medusa", "eagle"])
def test_a_drafter_of_another_engine_is_told_apart(make: Callable[[CausalLM], Drafter]) -> None:
    """An engine captures for the drafters that were built with it; without states the heads would read nothing."""
    model = tiny_target(3, layers=3, size=8)
    with pytest.raises(ValueError, match="asked for"):
        specdec.generate(model, torch.tensor([[1, 2]]), drafter=make(CausalLM(model)), max_new_tokens=4)
