"""The Medusa drafter: which state it reads, which tokens each place gets, and the trees that it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trained import random_medusa, tiny_target
from transformers import LlamaForCausalLM

from specdec.budget.adaptive import FixedBudget
from specdec.cpu.packed_linear import is_packed, pack, packing_fault
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters import medusa
from specdec.drafters.heads import shipped
from specdec.drafters.heads.medusa_heads import save_medusa
from specdec.drafters.heads.shipped import mismatch, target_facts
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.trees.expansion import ChildSampling
from specdec.drafters.trees.ranking import ranking
from specdec.engine.causal_lm import CausalLM
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Limit, Row
from specdec.rng import PhiloxRng, Rng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import make_verifier

VOCAB = 11
PROMPTS = [[5, 9, 3, 7, 1], [8, 9], [4]]
DRAFT_VOCAB = [0, 1, 3, 4, 7, 8, 9]


class Recording(MedusaDrafter):
    """Keeps what it proposed for which tokens."""

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        trees = super().propose(rows, limits, params, rng)
        self.seen += [(list(row.tokens), tree) for row, tree in zip(rows, trees, strict=True)]
        return trees


def recorded(shares: bool, vocab: list[int] | None) -> tuple[LlamaForCausalLM, Recording, int]:
    model = tiny_target(VOCAB, dtype=torch.float64)
    target = CausalLM(model)
    drafter = Recording(random_medusa(model, vocab, shares), target)
    drafter.seen = []
    rows = [Row(key, list(prompt), len(prompt) + 12 + key) for key, prompt in enumerate(PROMPTS)]
    logits_transform, budget = WarperTransform(SamplingParams()), FixedBudget(12)
    decoder = Decoder(
        target, drafter, make_verifier("match"), logits_transform, PhiloxRng(2), lambda row: False, budget
    )
    return model, drafter, sum(emission.step.num_accepted for emission in decoder.run(rows, 2))


@torch.no_grad()
def head_probs(model: LlamaForCausalLM, drafter: MedusaDrafter, tokens: Sequence[int]) -> Tensor:
    """(heads, V) from scratch: the heads at the newest token that the target has processed, all but the last."""
    state = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states[-1][0, -1]
    full = torch.zeros(drafter.heads.num_heads, VOCAB, dtype=torch.float64)
    full[:, drafter.heads.target_ids()] = drafter.heads(state, model.lm_head.weight).softmax(-1)
    return full


def check_trees(shares: bool, vocab: list[int] | None) -> None:
    """Compare what was proposed in runs with accepts, several rows and a late one with the heads from scratch."""
    model, drafter, num_accepted = recorded(shares, vocab)
    assert num_accepted > 5
    num_drafted = 0
    for tokens, tree in drafter.seen:
        if tokens in PROMPTS:
            assert len(tree) == 1, "nothing is known before the prompt is processed"
            continue
        num_drafted += len(tree) > 1
        probs, depths = head_probs(model, drafter, tokens), tree.depths()
        joint = {(): 1.0}
        for path in (tuple(tree.path_tokens(node)) for node in range(1, len(tree))):
            joint[path] = joint[path[:-1]] * float(probs[len(path) - 1, path[-1]])
        paths = [tuple(tree.path_tokens(node)) for node in range(len(tree))]
        torch.testing.assert_close(list(tree.estimates), [joint[path] for path in paths], atol=1e-6, rtol=1e-4)
        if len(tree) == 13:
            worst = min(tree.estimates)
            others = [float(probs[0, token]) for token in range(VOCAB) if (token,) not in joint]
            assert max(others) <= worst + 1e-6
        assert max(depths, default=0) <= 3
    assert num_drafted > 10


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("vocab", [None, DRAFT_VOCAB], ids=["full", "reduced"])
def test_trees_hold_the_best_paths_of_the_heads_at_the_newest_verified_token(
    shares: bool, vocab: list[int] | None
) -> None:
    """Guards the wrong state after an accept, in a batch, or behind a prompt; and ids of the draft vocabulary."""
    check_trees(shares, vocab)


def test_the_comparison_sees_the_state_of_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the state were always the root's."""
    hidden = CausalLM.hidden
    monkeypatch.setattr(CausalLM, "hidden", lambda self, scores: hidden(self, scores).roll(1, 0))
    with pytest.raises(AssertionError, match="not close"):
        check_trees(True, None)


def test_static_trees_follow_the_measured_accuracies_and_the_limit() -> None:
    model = tiny_target(VOCAB)
    heads = random_medusa(model)
    heads.accuracies = ((0.5, 0.3, 0.1), (0.4, 0.1, 0.05), (0.3, 0.1, 0.1))
    drafter = MedusaDrafter(heads, CausalLM(model), "static")
    row = Row(0, [3, 4], 30)
    drafter._hidden[row] = torch.randn(32)
    for limit, parents in {
        Limit(9, 3): (-1, 0, 0, 1),  # .5, .3, .5 * .4
        Limit(1, 3): (-1, 0, 0, 0),
        Limit(9, 3, chain_only=True): (-1, 0, 1, 2),
        Limit(0, 0): (-1,),
    }.items():
        assert drafter.propose([row], [limit], GREEDY, PhiloxRng(0))[0].parents == parents
    heads.accuracies, heads.choices = (), ((0,), (1,), (0, 0), (0, 1))
    (tree,) = drafter.propose([row], [Limit(9, 16)], GREEDY, PhiloxRng(0))
    assert tree.parents == (-1, 0, 0, 1, 1)


def test_coupled_candidates_follow_the_verifiers_noise() -> None:
    """At a high temperature the best tokens are those that the noise prefers, so they change from position to position."""
    model = tiny_target(VOCAB)
    target = CausalLM(model)
    hidden = torch.randn(32)
    firsts: dict[ChildSampling, set[int]] = {}
    for children in (ChildSampling.CERTAIN, ChildSampling.COUPLED):
        drafter = MedusaDrafter(random_medusa(model), target, children=children)
        rows = [Row(key, [3, 4], 30) for key in range(20)]
        drafter._hidden.update((row, hidden) for row in rows)
        trees = drafter.propose(rows, [Limit(1, 1)] * 20, SamplingParams(temperature=50.0), PhiloxRng(0))
        firsts[children] = {tree.tokens[1] for tree in trees}
    assert len(firsts[ChildSampling.CERTAIN]) == 1
    assert len(firsts[ChildSampling.COUPLED]) > 3


@pytest.mark.skipif(bool(packing_fault(torch.float32)), reason=packing_fault(torch.float32))
@pytest.mark.parametrize("in_float32", [True, False])
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("vocab", [None, list(range(0, 200, 2))], ids=["full", "reduced"])
def test_heads_of_an_accelerated_target_are_packed_and_say_the_same(
    vocab: list[int] | None, num_layers: int, shares: bool, in_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_float32:  # beside a packed float32 target heads run in bfloat16 where the processor has it
        monkeypatch.setattr(medusa, "draft_dtype", lambda target: target.model.dtype)
    model = tiny_target(200, size=128)
    plain = MedusaDrafter(random_medusa(model, vocab, shares, num_layers=num_layers), CausalLM(model))
    hidden = torch.randn(3, 128)
    expected = plain._logits(hidden)
    assert not is_packed(plain.heads)
    pack(model)
    packed = MedusaDrafter(random_medusa(model, vocab, shares, num_layers=num_layers), CausalLM(model))
    assert packed.heads.first is not None
    tolerance = 1e-5 if packed._dtype is torch.float32 else 0.02
    scale = float(expected.abs().max())
    torch.testing.assert_close(packed._logits(hidden).float(), expected, atol=tolerance * scale, rtol=1e-3)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(0.7, 5, 0.9)], ids=str)
def test_heads_that_share_no_noise_rank_their_tokens_at_once(params: SamplingParams) -> None:
    """All heads in one go, and each by itself as with noise."""
    heads = random_medusa(tiny_target(VOCAB))
    logits = heads(torch.randn(32), torch.randn(VOCAB, 32))
    each = torch.cat([ranking(row, params, None, depth) for depth, row in enumerate(logits.split(1))])
    torch.testing.assert_close(ranking(logits, params, None, 0), each)


def test_the_shipped_heads_are_found_for_their_target_and_for_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_target()
    save_medusa(random_medusa(model), tmp_path / "name", target_facts(model))
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    assert shipped.find("medusa", "name", CausalLM(model), None) == tmp_path / "name"
    assert shipped.find("medusa", "name", CausalLM(model), "elsewhere") == Path("elsewhere")
    with pytest.raises(UnsupportedModelError, match=r"another model \(num_hidden_layers 5, .*specdec train medusa"):
        shipped.find("medusa", "name", CausalLM(tiny_target(layers=4)), None)


def test_a_head_knows_its_target_in_any_precision_and_from_its_sisters() -> None:
    facts = target_facts(tiny_target())
    assert mismatch(facts, target_facts(tiny_target(dtype=torch.bfloat16))) == ""
    other = tiny_target()
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    assert mismatch(facts, target_facts(other)) == "same sizes, other weights"
    assert "num_hidden_layers 5, this model's is 4" in mismatch(facts, target_facts(tiny_target(layers=4)))
    assert mismatch({}, facts)
