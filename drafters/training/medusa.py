"""Training of Medusa heads: head i learns the target's distribution i + 2 places ahead, weighted by 0.8^i."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from specdec.drafters.heads.medusa_heads import MedusaHeads, load_medusa, save_medusa
from specdec.drafters.heads.shipped import target_facts
from specdec.drafters.training.job import Facts, Job
from specdec.drafters.training.outcome import Batch, Outcome
from specdec.drafters.training.recipes import MedusaRecipe
from specdec.drafters.training.targets import SoftTargets
from specdec.drafters.training.vocabulary import check_output, draft_vocabulary

DECAY = 0.8


def train_medusa(job: Job, recipe: MedusaRecipe) -> Facts:
    """Train heads by ``recipe`` and save them.

    Raises:
        CheckpointError: ``start_from`` names heads of another target, or of another form than the recipe.
    """
    config = job.model.config.get_text_config()
    start = None
    if recipe.start_from is not None:
        path = Path(recipe.start_from).expanduser()
        start = load_medusa(path, config.hidden_size, config.vocab_size)
        check_output(path, start.shares_output, recipe.own_output)
    ids, facts = draft_vocabulary(job, recipe.draft_vocab, None if start is None else start.target_ids())
    matrix = job.output_rows(ids)
    heads = _new_heads(job, recipe, ids, matrix) if start is None else start.float()
    facts |= job.fit(MedusaTraining(heads, None if recipe.own_output else matrix), recipe.settings)
    heads.accuracies = tuple(map(tuple, facts["table"]))
    job.save(lambda: save_medusa(heads.to(torch.bfloat16), job.folder, target_facts(job.model)))
    return facts


def _new_heads(job: Job, recipe: MedusaRecipe, ids: Tensor, matrix: Tensor) -> MedusaHeads:
    """Heads that draft ``ids`` (Vd,); output matrices of their own begin as the target's rows ``matrix`` (Vd, H)."""
    config = job.model.config.get_text_config()
    vocab = ids if len(ids) < config.vocab_size else None
    sizes = (recipe.heads, recipe.head_layers, config.hidden_size, config.vocab_size)
    heads = MedusaHeads(*sizes, vocab, shares_output=not recipe.own_output)
    if recipe.own_output:
        with torch.no_grad():
            for head in heads.heads:
                head[-1].weight.copy_(matrix)  # type: ignore[index]
    return heads


class MedusaTraining(nn.Module):
    """Heads with the loss of the Medusa paper, against soft targets.

    The target's distribution behind the true text up to there is an unbiased guess of what a head can know, with less
    noise than the token that was drawn from it.

    Args:
        heads: what is trained.
        output_weight: (Vd, H) the target's output matrix at the draft vocabulary, if the heads share it; stays fixed.
    """

    output_weight: Tensor

    def __init__(self, heads: MedusaHeads, output_weight: Tensor | None) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("output_weight", output_weight, persistent=False)
        self.targets = SoftTargets(heads.target_ids(), heads.vocab_size)

    def forward(self, batch: Batch) -> Outcome:
        length = batch["tokens"].shape[1]
        positions = torch.arange(length, device=batch["tokens"].device)
        dtype = next(self.heads.parameters()).dtype
        hidden = batch["hidden"].to(dtype)
        loss = hidden.new_zeros(())
        ranks: list[Tensor] = []
        states = self.heads.states(hidden)
        for i in range(self.heads.num_heads):
            ahead = i + 1  # the distribution behind the token that stands so far on
            num_places = max(length - ahead, 0)
            valid = positions[:num_places] + ahead < batch["lengths"][:, None]
            top_ids, top_logprobs = (batch[key][:, ahead:][valid] for key in ("top_ids", "top_logprobs"))
            head_states = states[i, :, :num_places][valid]
            head_loss, rank = self.targets(head_states, self._matrix(i), top_ids, top_logprobs)
            loss = loss + DECAY**i * head_loss
            ranks.append(rank)
        return Outcome(loss, tuple(ranks))

    def _matrix(self, head: int) -> Tensor:
        if self.heads.shares_output:
            return self.output_weight
        weight: Tensor = self.heads.heads[head][-1].weight  # type: ignore[index]
        return weight
