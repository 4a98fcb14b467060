"""How likely each token is the target's, by a draft's logits; shared by all drafters with logits.

Letters: k nodes of one level, V the target's vocabulary, Vd the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.rng import RowRng
from specdec.sampling import SamplingParams, sampling_probs


@dataclass(frozen=True, slots=True)
class DraftVocab:
    """Which of the target's token ids the columns of a draft's logits stand for."""

    ids: Tensor  # (Vd,)
    size: int  # V

    def spread(self, probs: Tensor) -> Tensor:
        """``probs`` (Vd,) over the target's vocabulary (V,), 0 elsewhere."""
        return torch.zeros(self.size, dtype=probs.dtype, device=probs.device).scatter_(0, self.ids, probs)


def ranking(
    logits: Tensor, params: SamplingParams, rng: RowRng | None, depth: int, vocab: DraftVocab | None = None
) -> Tensor:
    """How likely each token is the target's: (k, Vd) probabilities for the draft's ``logits`` (k, Vd) at one depth.

    With ``noise``, the verifier's own, softmax(log q + noise): drafter-invariant coupling (Daliri et al., 2024).
    """
    if params.is_greedy:
        return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
    probs = torch.stack([sampling_probs(node_logits, params) for node_logits in logits])
    if rng is None:
        return probs
    support = (probs > 0).any(0).nonzero().squeeze(-1)
    gumbel = rng.gumbel(support if vocab is None else vocab.ids[support], depth)
    scores = (probs[:, support].double().log() + gumbel).softmax(-1)
    return torch.zeros(probs.shape, dtype=scores.dtype, device=probs.device).index_copy_(1, support, scores)
