"""The target's best tokens at every node of a pass, which a table of successors remembers.

Letters for shapes: n nodes of one tree, k successors, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafters.lookup.successors import classes_of
from specdec.interfaces import Scores

_BLOCK = 256  # tokens


def top_successors(scores: Sequence[Scores], num: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """The best successors of all nodes of all rows (sum of n, k) and their classes, on the host.

    -1 stands where the logits rule a token out.
    """
    logits = [score.logits for score in scores]
    if logits[0].is_cuda:  # one launch for all rows; on the host a copy of all logits would cost more than it saves
        logits = [torch.cat(logits)]
    best = [top_tokens(row_logits, num) for row_logits in logits]
    pairs = list(zip(logits, best, strict=True))
    is_allowed = torch.cat([row_logits.gather(-1, tokens).isfinite() for row_logits, tokens in pairs])
    successors = torch.cat(best).masked_fill(~is_allowed, -1)
    # A softmax takes half the time of a log-sum-exp.
    probs = torch.cat([row_logits.softmax(-1).gather(-1, tokens) for row_logits, tokens in pairs])
    return successors.to("cpu", torch.int32).numpy(), classes_of(probs.float().cpu().numpy())


def top_tokens(logits: Tensor, num: int) -> Tensor:
    """The ``num`` best tokens (n, num) of ``logits`` (n, V), best first.

    They lie in the blocks of the vocabulary whose best logits are highest, which are found sooner than they are.
    """
    size = _BLOCK * num
    num_blocks = logits.shape[1] // _BLOCK
    if logits.is_cuda or num_blocks < 4 * num:
        return logits.topk(num).indices
    blocks = logits[:, : num_blocks * _BLOCK].view(len(logits), num_blocks, _BLOCK)
    chosen = blocks.amax(-1).topk(num).indices
    candidates = torch.cat(
        [blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1), logits[:, num_blocks * _BLOCK :]], 1
    )
    places = candidates.topk(num).indices
    inside = chosen.gather(1, (places // _BLOCK).clamp(max=num - 1)) * _BLOCK + places % _BLOCK
    return torch.where(places < size, inside, places - size + num_blocks * _BLOCK)
