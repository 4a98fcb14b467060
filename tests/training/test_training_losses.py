"""Losses against what they stand for: plain autograd, full distributions, and drafting one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trained import random_eagle, random_medusa, tiny_target
from transformers import LlamaForCausalLM

from specdec.drafters.heads.eagle_cell import EagleCell
from specdec.drafters.training import eagle as eagle_module
from specdec.drafters.training.draft import tail_divergence
from specdec.drafters.training.eagle import EagleTraining, unrolled_attention
from specdec.drafters.training.medusa import MedusaTraining
from specdec.drafters.training.targets import SoftTargets

V = 61


pytestmark = pytest.mark.usefixtures("one_thread")


def top(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The best ids and their log-probabilities under the whole distribution."""
    best = logits.log_softmax(-1).topk(size)
    return best.indices, best.values


# ----- soft targets -----


def reference(
    states: Tensor, matrix: Tensor, top_ids: Tensor, top_logprobs: Tensor, ids: list[int]
) -> tuple[Tensor, list[int]]:
    """Mean cross entropy and ranks, a position and a token at a time."""
    losses, ranks = [], []
    for state, tokens, logprobs in zip(states, top_ids.tolist(), top_logprobs.exp(), strict=True):
        logits = matrix @ state
        ours = logits.log_softmax(-1)
        known = [(ids.index(token), prob) for token, prob in zip(tokens, logprobs, strict=True) if token in ids]
        total = sum((prob for _, prob in known), torch.zeros((), dtype=states.dtype))
        losses.append(sum((-prob / total * ours[place] for place, prob in known), logits.sum() * 0))
        ranks.append(int((logits > logits[ids.index(tokens[0])]).sum()) if tokens[0] in ids else len(ids))
    return torch.stack(losses).mean(), ranks


@pytest.mark.parametrize("num", [1, 5, 300], ids=lambda num: f"{num}-positions")  # 128 make a chunk
@pytest.mark.parametrize("ids", [list(range(V)), list(range(1, V, 3)), [60, 7]], ids=["all", "third", "two"])
def test_the_fused_loss_and_both_gradients_are_those_of_autograd(num: int, ids: list[int]) -> None:
    """With two ids most positions have none of their best tokens in the draft vocabulary: they must count as 0."""
    generator = torch.Generator().manual_seed(num)
    states = torch.randn(num, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(len(ids), 16, generator=generator, dtype=torch.float64, requires_grad=True)
    top_ids, top_logprobs = top(2 * torch.randn(num, V, generator=generator, dtype=torch.float64), 9)
    true, true_ranks = reference(states, matrix, top_ids, top_logprobs, ids)
    true_grads = torch.autograd.grad(3 * true, (states, matrix))
    loss, ranks = SoftTargets(torch.tensor(ids), V)(states, matrix, top_ids, top_logprobs)
    grads = torch.autograd.grad(3 * loss, (states, matrix))
    assert float(loss.detach()) == pytest.approx(float(true.detach()), rel=1e-5)
    assert ranks.tolist() == true_ranks
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad, true_grad, rtol=1e-4, atol=1e-6)  # sums are kept in float32


@pytest.mark.parametrize("trained", ["states", "matrix", "neither"])
def test_what_is_fixed_gets_no_gradient(trained: str) -> None:
    states = torch.randn(7, 4, requires_grad=trained == "states")
    matrix = torch.randn(V, 4, requires_grad=trained == "matrix")
    top_ids, top_logprobs = top(torch.randn(7, V), 5)
    ids = list(range(V))
    loss, _ = SoftTargets(torch.tensor(ids), V)(states, matrix, top_ids, top_logprobs)
    assert loss.requires_grad == (trained != "neither")
    if trained != "neither":
        loss.backward()
        learned = {"states": states, "matrix": matrix}[trained]
        mine, learned.grad = learned.grad, None
        reference(states, matrix, top_ids, top_logprobs, ids)[0].backward()
        torch.testing.assert_close(mine, learned.grad, rtol=1e-4, atol=1e-5)


def test_no_positions_are_no_loss() -> None:
    """Batches of texts that are shorter than a head looks ahead."""
    empty, ids = torch.zeros(0, 5), torch.arange(V)
    states = torch.zeros(0, 4, requires_grad=True)
    loss, ranks = SoftTargets(ids, V)(states, torch.randn(V, 4), empty.long(), empty)
    loss.backward()
    assert float(loss.detach()) == 0
    assert ranks.shape == (0,)


# ----- the rest of a distribution as one outcome -----


def test_divergence_is_the_full_one_where_the_rest_is_proportional() -> None:
    """There one outcome for all other tokens says as much as each of them."""
    torch.manual_seed(0)
    target = torch.randn(20, V, dtype=torch.float64).mul(2)
    top_ids, top_logprobs = top(target, 6)
    draft = target.scatter_add(-1, top_ids, torch.randn(20, 6, dtype=torch.float64))
    full = nn.functional.kl_div(draft.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    loss, ranks = tail_divergence(draft, top_ids, top_logprobs)
    assert float(full) > 0.1
    assert float(loss) == pytest.approx(float(full), rel=1e-9)
    assert ranks.tolist() == [int((row > row[ids[0]]).sum()) for row, ids in zip(draft, top_ids, strict=True)]


def test_divergence_says_less_where_the_rest_differs() -> None:
    """Merging outcomes never adds to a divergence."""
    torch.manual_seed(1)
    target, draft = torch.randn(2, 20, V, dtype=torch.float64).mul(2)
    full = nn.functional.kl_div(draft.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    loss, _ = tail_divergence(draft, *top(target, 6))
    assert 0 < float(loss) < float(full)


@pytest.mark.parametrize("size", [1, 6, V], ids=lambda size: f"{size}-kept")
def test_a_model_that_is_exact_has_nothing_to_learn(size: int) -> None:
    torch.manual_seed(2)
    logits = torch.randn(20, V, dtype=torch.float64).mul(2).requires_grad_()
    loss, ranks = tail_divergence(logits, *top(logits.detach(), size))
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6
    assert not ranks.any()
    other = logits.detach().roll(1, -1).requires_grad_()
    tail_divergence(other, *top(logits.detach(), size))[0].backward()
    assert other.grad is not None
    assert float(other.grad.abs().max()) > 1e-3


# ----- Medusa -----


def chain_batch(lengths: list[int], num_tokens: int = 8) -> dict[str, Tensor]:
    """Texts in which the target is certain: token t is followed by t + 1; hidden states name the token they follow."""
    width = max(lengths)
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, :length] = (torch.arange(length) + row) % num_tokens
    follow = (tokens + 1) % num_tokens
    return {
        "tokens": tokens,
        "lengths": torch.tensor(lengths),
        "hidden": nn.functional.one_hot(tokens, num_tokens).float(),
        "features": torch.zeros(*tokens.shape, 0),
        "top_ids": torch.stack([follow, (follow + 1) % num_tokens], -1),
        "top_logprobs": torch.tensor([0.0, -math.inf]).expand(*tokens.shape, 2),
    }


def shifting_heads(by: int, num_heads: int = 3, num_tokens: int = 8) -> MedusaTraining:
    """Heads that are sure of the token that stands ``by`` + i places behind the newest one, in a chain."""
    heads = random_medusa(tiny_target(vocab=num_tokens, size=num_tokens, layers=1), num_heads=num_heads)
    module = MedusaTraining(heads, 50 * torch.eye(num_tokens))
    successor = torch.eye(num_tokens).roll(1, -1)

    def states(hidden: Tensor) -> Tensor:
        return torch.stack([hidden @ torch.linalg.matrix_power(successor, by + i) for i in range(num_heads)])

    heads.states = states  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("lengths", [[9, 9], [12, 5, 3, 2, 1], [2]], ids=str)
def test_head_i_learns_the_token_i_plus_2_places_on(lengths: list[int]) -> None:
    """The target itself says what stands one place on."""
    with torch.no_grad():
        outcome = shifting_heads(2)(chain_batch(lengths))
        assert float(outcome.loss) == pytest.approx(0, abs=1e-4)
    counts = [sum(max(length - 1 - i, 0) for length in lengths) for i in range(3)]
    assert [len(ranks) for ranks in outcome.ranks] == counts
    assert not any(ranks.any() for ranks in outcome.ranks)


@pytest.mark.parametrize("by", [0, 1, 3])
def test_heads_that_look_another_number_of_places_ahead_have_a_loss(by: int) -> None:
    with torch.no_grad():
        assert float(shifting_heads(by)(chain_batch([9, 9])).loss) > 10


def test_padding_teaches_medusa_nothing() -> None:
    """The same texts, with more padding and garbage in it."""
    torch.manual_seed(0)
    module = MedusaTraining(random_medusa(tiny_target(vocab=8, size=8, layers=1)), torch.randn(8, 8))
    batch = chain_batch([6, 9])
    longer = {key: torch.cat([x, torch.full_like(x[:, :4], 3)], 1) for key, x in batch.items() if key != "lengths"}
    longer["lengths"] = batch["lengths"]
    with torch.no_grad():
        mine, theirs = module(batch), module(longer)
    assert float(mine.loss) == pytest.approx(float(theirs.loss), rel=1e-6)
    assert [ranks.tolist() for ranks in mine.ranks] == [ranks.tolist() for ranks in theirs.ranks]


@torch.no_grad()
def test_medusas_loss_is_weighted_by_head() -> None:
    module = MedusaTraining(random_medusa(tiny_target(vocab=8, size=8, layers=1)), torch.randn(8, 8))
    batch = chain_batch([9, 9])
    states = module.heads.states(batch["hidden"])
    total = 0.0
    for i in range(3):
        ours = (states[i, :, : 8 - i] @ module.output_weight.T).log_softmax(-1)
        total += 0.8**i * float(-ours.gather(-1, batch["top_ids"][:, 1 + i :, :1]).mean())
    assert float(module(batch).loss) == pytest.approx(total, rel=1e-5)


# ----- EAGLE -----

DRAFT_VOCAB = [0, 1, *range(3, 50, 2)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_target(vocab=V, layers=4).double()


@pytest.fixture(scope="module")
def cell(model: LlamaForCausalLM) -> EagleCell:
    return random_eagle(model, DRAFT_VOCAB).double()


@torch.no_grad()
def eagle_batch(model: LlamaForCausalLM, lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    tokens = torch.randint(V, (len(lengths), width), generator=generator)
    result = model(input_ids=tokens, output_hidden_states=True)
    top_ids, top_logprobs = top(result.logits, 9)
    return {
        "tokens": tokens,
        "lengths": torch.tensor(lengths),
        "hidden": result.hidden_states[-1],
        "features": torch.cat([result.hidden_states[i] for i in (2, 2, 1)], -1),
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
    }


@torch.no_grad()
def drafted(cell: EagleCell, embeds: Tensor, features: Tensor, root: int, num_steps: int) -> list[Tensor]:
    """Draft logits (Vd,) when drafting begins at slot ``root``, one token at a time, the true text being accepted.

    ``embeds`` (T, H) of the tokens of one text, ``features`` (T, F). Slot t reads the embedding of token t + 1. Keys
    grow with every slot: true ones up to the root, then the cell's own.
    """
    keys: list[list[Tensor]] = [[] for _ in range(cell.num_layers)]
    values: list[list[Tensor]] = [[] for _ in range(cell.num_layers)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[layer].append(k[0, :, 0])
        values[layer].append(v[0, :, 0])
        ratio = q.shape[1] // k.shape[1]
        seen_keys, seen_values = (torch.stack(x[layer], 1).repeat_interleave(ratio, 0) for x in (keys, values))
        weights = (seen_keys @ q[0, :, 0, :, None] / q.shape[-1] ** 0.5).softmax(1)
        return (weights.transpose(1, 2) @ seen_values)[None]

    logits = []
    state = torch.empty(0)
    for slot in range(root + num_steps):
        if slot + 1 >= len(embeds):
            break
        state_in = cell.fuse(features[slot]) if slot <= root else state
        state = cell(embeds[None, slot + 1, None], state_in.view(1, 1, -1), torch.tensor([[slot]]), attend)[0, 0]
        if slot >= root:
            logits.append(cell.logits(state))
    return logits


def simulated(module: EagleTraining, batch: dict[str, Tensor]) -> tuple[float, list[list[int]]]:
    """The loss, and the sorted ranks of each step, of drafting from every slot of every text."""
    ids = module.cell.target_ids().tolist()
    losses: list[list[float]] = [[] for _ in range(module.num_steps)]
    ranks: list[list[int]] = [[] for _ in range(module.num_steps)]
    for row, length in enumerate(batch["lengths"].tolist()):
        embeds, features = module.embedding[batch["tokens"][row, :length]], batch["features"][row, :length]
        for root in range(length - 1):
            for step, logits in enumerate(drafted(module.cell, embeds, features, root, module.num_steps)):
                at = (row, root + step + 1)
                known = [
                    (ids.index(token), prob)
                    for token, prob in zip(batch["top_ids"][at].tolist(), batch["top_logprobs"][at].exp(), strict=True)
                    if token in ids
                ]
                total = sum(float(prob) for _, prob in known)
                ours = logits.log_softmax(-1)
                losses[step].append(sum(-float(prob) / total * float(ours[place]) for place, prob in known))
                best = int(batch["top_ids"][at][0])
                ranks[step].append(int((logits > logits[ids.index(best)]).sum()) if best in ids else len(ids))
    loss = sum(0.8**step * sum(values) / len(values) for step, values in enumerate(losses))
    return loss, [sorted(step) for step in ranks]


def agrees_with_drafting(module: EagleTraining, batch: dict[str, Tensor]) -> bool:
    loss, ranks = simulated(module, batch)
    with torch.no_grad():
        outcome = module(batch)
    same = [sorted(step.tolist()) for step in outcome.ranks] == ranks
    return same and math.isclose(float(outcome.loss), loss, rel_tol=1e-5)  # sums are kept in float32


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_training_is_drafting_from_every_slot_at_once(model: LlamaForCausalLM, cell: EagleCell, num_steps: int) -> None:
    module = EagleTraining(cell, model.get_input_embeddings().weight.detach(), num_steps)
    assert agrees_with_drafting(module, eagle_batch(model, [9, 12, 2, 5]))


PUBLISHED: dict[str, dict[str, Any]] = {
    "norm_output": {"norm_output": True},
    "two layers": {"num_hidden_layers": 2},
    "norms before fc and of queries": {"norm_before_fc": True, "fc_norm": True, "qk_norm": True},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_so_it_is_for_cells_of_published_kinds(model: LlamaForCausalLM, kind: str) -> None:
    """Guards a state that is normed twice, and keys of two layers in one list."""
    cell = random_eagle(model, DRAFT_VOCAB, **PUBLISHED[kind]).double()
    module = EagleTraining(cell, model.get_input_embeddings().weight.detach(), 3)
    assert agrees_with_drafting(module, eagle_batch(model, [9, 12, 5]))


def later_mask(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The mutant: step k sees true slots up to t - k + 1, one too many."""
    if len(keys) == 1:
        return unrolled_attention(q, keys, values)
    first = [torch.cat([x[0][:, :, 1:], x[0][:, :, :1]], 2) for x in (keys, values)]
    return unrolled_attention(q, [first[0], *keys[1:]], [first[1], *values[1:]])


def unmoved_keys(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The mutant: the keys of earlier steps stand where they were made, not where this draft put them."""
    step = len(keys) - 1
    back = [[torch.roll(x[j], j - step, 2) if 0 < j < step else x[j] for j in range(step + 1)] for x in (keys, values)]
    return unrolled_attention(q, *back)


def only_latest(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The mutant: a draft forgets its own tokens but the newest."""
    if len(keys) < 3:
        return unrolled_attention(q, keys, values)
    hidden = [keys[0], *(torch.full_like(k, -1e4) * q.mean().sign() for k in keys[1:-1]), keys[-1]]
    return unrolled_attention(q, hidden, [values[0], *map(torch.zeros_like, values[1:-1]), values[-1]])


@pytest.mark.parametrize("mutant", [later_mask, unmoved_keys, only_latest])
def test_that_comparison_finds_a_mutant(
    model: LlamaForCausalLM,
    cell: EagleCell,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[Tensor, list[Tensor], list[Tensor]], Tensor],
) -> None:
    module = EagleTraining(cell, model.get_input_embeddings().weight.detach(), 3)
    batch = eagle_batch(model, [9, 12])
    assert agrees_with_drafting(module, batch)
    monkeypatch.setattr(eagle_module, "unrolled_attention", mutant)
    assert not agrees_with_drafting(module, batch)


def test_that_comparison_finds_embeddings_of_the_wrong_token(model: LlamaForCausalLM, cell: EagleCell) -> None:
    module = EagleTraining(cell, model.get_input_embeddings().weight.detach(), 2)
    batch = eagle_batch(model, [9, 12])
    wrong = {**batch, "tokens": batch["tokens"].roll(1, 1)}
    with torch.no_grad():
        assert not math.isclose(float(module(wrong).loss), simulated(module, batch)[0], rel_tol=1e-3)


def test_gradients_reach_every_trained_part_of_the_cell(model: LlamaForCausalLM) -> None:
    cell = random_eagle(model, DRAFT_VOCAB).double()
    cell.lm_head.weight.requires_grad_(False)
    EagleTraining(cell, model.get_input_embeddings().weight.detach(), 3)(eagle_batch(model, [9, 12])).loss.backward()
    untouched = [name for name, p in cell.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == ["lm_head.weight"]


def test_the_number_of_steps_is_checked(model: LlamaForCausalLM, cell: EagleCell) -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        EagleTraining(cell, model.get_input_embeddings().weight.detach(), 0)
