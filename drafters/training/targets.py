"""The loss of draft heads: cross entropy with the target's distribution, restricted to a draft vocabulary.

Fused with the output matrix, a few positions at a time: logits over a vocabulary are by far the largest tensors of
training, and written out for all positions they would cost more time than the matrix products. Letters: N positions,
H hidden size, Vd draft vocabulary, K kept tokens of each target distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 128  # positions whose logits exist at a time


class SoftTargets(nn.Module):
    """Targets given by their best tokens, renormalised over those in the draft vocabulary.

    Args:
        ids: (Vd,) target ids of the draft vocabulary's rows.
        vocab_size: V of the target.
    """

    place: Tensor

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        super().__init__()
        place = torch.full((vocab_size,), -1)
        place[ids] = torch.arange(len(ids))
        self.register_buffer("place", place, persistent=False)

    def forward(
        self, states: Tensor, output_weight: Tensor, top_ids: Tensor, top_logprobs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean cross entropy (), and the rank (N,) of the target's best token under the draft, 0 for the best.

        ``states`` (N, H) times ``output_weight`` (Vd, H) are the draft's logits; ``top_ids`` and ``top_logprobs``
        (N, K) the target. A position none of whose best tokens is in the draft vocabulary counts as 0; the rank of a
        best token that is not in it is Vd.
        """
        places = self.place[top_ids]
        weights = torch.where(places >= 0, top_logprobs.float().exp(), 0.0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
        if torch.is_autocast_enabled(states.device.type):
            dtype = torch.get_autocast_dtype(states.device.type)
            states, output_weight = states.to(dtype), output_weight.to(dtype)
        loss, ranks = _CrossEntropy.apply(states, output_weight, places.clamp(min=0), weights)  # type: ignore[no-untyped-call]
        return loss / max(len(states), 1), torch.where(places[:, 0] >= 0, ranks, output_weight.shape[0])


class _CrossEntropy(torch.autograd.Function):
    """(sum of losses (), ranks (N,)) of states (N, H), matrix (Vd, H), places and weights (N, K); gradients made on the way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, matrix: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            loss = states.new_zeros((), dtype=torch.float32)
            ranks = places.new_zeros(len(states))
            grad_states = torch.empty_like(states) if any(ctx.needs_input_grad) else None
            grad_matrix = torch.zeros_like(matrix, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for first in range(0, len(states), _CHUNK):
                rows = slice(first, first + _CHUNK)
                logits = (states[rows] @ matrix.T).float()
                wanted, share = places[rows], weights[rows]
                wanted_logits = logits.gather(-1, wanted)
                ranks[rows] = (logits > wanted_logits[:, :1]).sum(-1)
                peak = logits.amax(-1, keepdim=True)
                probs = logits.sub_(peak).exp_()
                total = probs.sum(-1, keepdim=True)
                loss += (share * (total.log() + peak - wanted_logits)).sum()
                if grad_states is None:
                    continue
                grads = probs.mul_(share.sum(-1, keepdim=True) / total).scatter_add_(-1, wanted, -share)
                grads = grads.to(matrix.dtype)
                grad_states[rows] = grads @ matrix
                if grad_matrix is not None:
                    grad_matrix += (grads.T @ states[rows]).float()
            ctx.save_for_backward(*(g for g in (grad_states, grad_matrix) if g is not None))
            ctx.has_matrix = grad_matrix is not None
            ctx.dtype = matrix.dtype
            ctx.mark_non_differentiable(ranks)
            return loss, ranks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_states, *rest = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_states * scale.to(grad_states.dtype),
            (rest[0] * scale).to(ctx.dtype) if ctx.has_matrix else None,
            None,
            None,
        )
