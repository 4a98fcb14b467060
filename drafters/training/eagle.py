"""Training of EAGLE-3's cell by its training-time test (Li et al., 2025): the cell learns on its own outputs.

Slot t reads the embedding of token t + 1 and a state, and predicts token t + 2. In step 0 the state is made of the
target's features at t. In step k it is the cell's output of step k - 1 at slot t - 1, as if drafting had begun k slots
earlier: the slot then attends to true slots up to t - k, and to its own k latest ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.heads.eagle_cell import EagleCell, FeatureCell
from specdec.drafters.heads.eagle_config import EagleConfig
from specdec.drafters.heads.eagle_engine import head_layers, share_output
from specdec.drafters.heads.eagle_format import load_eagle, save_eagle
from specdec.drafters.heads.shipped import target_facts
from specdec.drafters.training.job import Facts, Job
from specdec.drafters.training.outcome import Batch, Outcome
from specdec.drafters.training.recipes import EagleRecipe
from specdec.drafters.training.targets import SoftTargets
from specdec.drafters.training.vocabulary import check_output, draft_vocabulary
from specdec.drafters.training.warm_start import warm_start
from specdec.errors import CheckpointError

DECAY = 0.8


def train_eagle(job: Job, recipe: EagleRecipe) -> Facts:
    """Train a cell by ``recipe`` and save it.

    Raises:
        CheckpointError: ``start_from`` names a head of another target, or one of a form that is not trained here.
    """
    start = None if recipe.start_from is None else _started(job, recipe, Path(recipe.start_from).expanduser())
    ids, facts = draft_vocabulary(job, recipe.draft_vocab, None if start is None else start.target_ids())
    if start is None:
        cell = EagleCell(EagleConfig.for_target(job.model.config, len(ids)), ids)
        if not warm_start(cell, job.model):
            job.say(
                "the target's last layer does not fit the cell: attention or its feed-forward part starts at random"
            )
    else:
        cell = start.float()
        share_output(cell, job.model)
    cell.lm_head.weight.requires_grad_(recipe.own_output)
    facts |= job.fit(EagleTraining(cell, embedding_table(job.model), recipe.steps), recipe.settings)
    # The target's own output matrix need not be stored again.
    shares = not recipe.own_output
    job.save(lambda: save_eagle(cell.to(torch.bfloat16), job.folder, target_facts(job.model), shares))
    return facts


def _started(job: Job, recipe: EagleRecipe, path: Path) -> EagleCell:
    config = job.model.config.get_text_config()
    cell = load_eagle(path, config.hidden_size, config.vocab_size)
    if isinstance(cell, FeatureCell):
        raise CheckpointError(f"{path} is an EAGLE-1 or 2 head: only EAGLE-3 heads are trained here")
    layers = head_layers(cell.config, config.num_hidden_layers)
    if layers != tuple(job.store.layers):
        raise CheckpointError(
            f"{path} reads hidden_states{list(layers)} of its target, and heads are trained here on "
            f"hidden_states{list(job.store.layers)}: it can be used, but not trained further"
        )
    check_output(path, cell.config.shares_output, recipe.own_output)
    return cell


@torch.no_grad()
def embedding_table(model: Any) -> Tensor:
    """(V, H) what the model's embedding layer gives for each id: some scale their weights."""
    layer = model.get_input_embeddings()
    table: Tensor = layer(torch.arange(len(layer.weight), device=layer.weight.device))
    return table.float()


class EagleTraining(nn.Module):
    """A cell with the loss of EAGLE-3: cross entropy with the target's distribution, weighted by 0.8^step.

    Args:
        cell: what is trained.
        embedding: (V, H) of the target; stays fixed.
        num_steps: how many tokens ahead the cell is unrolled.
    """

    embedding: Tensor

    def __init__(self, cell: EagleCell, embedding: Tensor, num_steps: int = 3) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.cell, self.num_steps = cell, num_steps
        self.register_buffer("embedding", embedding, persistent=False)
        self.targets = SoftTargets(cell.target_ids(), cell.config.vocab_size)

    def forward(self, batch: Batch) -> Outcome:
        tokens, lengths = batch["tokens"], batch["lengths"]
        num_slots = tokens.shape[1] - 1
        slots = torch.arange(num_slots, device=tokens.device)
        positions = slots.expand(len(tokens), -1)
        dtype = self.cell.dtype
        embeds = self.embedding[tokens[:, 1:]].to(dtype)
        features = batch["features"][:, :-1].to(dtype)
        loss = embeds.new_zeros(())
        ranks: list[Tensor] = []
        for step, states in enumerate(unrolled(self.cell, embeds, features, positions, self.num_steps)):
            valid = (slots + 1 < lengths[:, None]) & (slots >= step)
            top_ids, top_logprobs = (batch[key][:, 1:][valid] for key in ("top_ids", "top_logprobs"))
            step_loss, rank = self.targets(
                self.cell.outputs(states[valid]), self.cell.lm_head.weight, top_ids, top_logprobs
            )
            loss = loss + DECAY**step * step_loss
            ranks.append(rank)
        return Outcome(loss, tuple(ranks))


def unrolled(cell: EagleCell, embeds: Tensor, features: Tensor, positions: Tensor, num_steps: int) -> Iterator[Tensor]:
    """The states (B, T, H) of each step on ``embeds`` (B, T, H), ``features`` (B, T, F) and ``positions`` (B, T).

    Step k reads at slot t what step k - 1 put out at slot t - 1.
    """
    keys: list[list[Tensor]] = [[] for _ in range(cell.num_layers)]
    values: list[list[Tensor]] = [[] for _ in range(cell.num_layers)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[layer].append(k)
        values[layer].append(v)
        return unrolled_attention(q, keys[layer], values[layer])

    states = cell.fuse(features)
    for step in range(num_steps):
        if step:
            states = nn.functional.pad(states[:, :-1], (0, 0, 1, 0))
        states = cell(embeds, states, positions, attend)
        yield states


def unrolled_attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """(B, heads, T, D): what step k = len(keys) - 1 attends to.

    The queries ``q`` (B, heads, T, D) of slot t see the keys (B, G, T, D) of step 0 up to slot t - k, and those of
    step j at slot t - k + j for each j from 1 to k.
    """
    step = len(keys) - 1
    if step == 0:
        return nn.functional.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True, enable_gqa=True)
    batch, heads, length, size = q.shape
    groups = keys[0].shape[1]
    q = q.view(batch, groups, heads // groups, length, size) * size**-0.5
    scores = q @ keys[0][:, :, None].transpose(-1, -2)
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1 - step)
    scores = scores.masked_fill(hidden, float("-inf"))
    own = [(_shifted(keys[j], step - j), _shifted(values[j], step - j)) for j in range(1, step + 1)]
    extra = torch.stack([(q * k[:, :, None]).sum(-1) for k, _ in own], -1)
    weights = torch.cat([scores, extra], -1).float().softmax(-1).to(q.dtype)
    mixed = weights[..., :length] @ values[0][:, :, None]
    for j, (_, v) in enumerate(own):
        mixed = mixed + weights[..., length + j, None] * v[:, :, None]
    return mixed.view(batch, heads, length, size)


def _shifted(x: Tensor, by: int) -> Tensor:
    """``x`` (B, G, T, D) moved ``by`` slots to the right, zeros in front."""
    return x if by == 0 else nn.functional.pad(x[:, :, :-by], (0, 0, by, 0))
