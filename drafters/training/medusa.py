"""Training of Medusa heads: head i learns the target's distribution i + 2 places ahead, weighted by 0.8^i."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdec.drafters.heads.medusa_heads import MedusaHeads
from specdec.drafters.training.outcome import Batch, Outcome
from specdec.drafters.training.targets import SoftTargets

DECAY = 0.8


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
