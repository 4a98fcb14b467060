"""The joint distribution that plain sampling of a tiny real model has."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from transformers import LlamaForCausalLM

PROMPT = (0, 1)


def law(model: LlamaForCausalLM, num_tokens: int) -> dict[Hashable, float]:
    """What plain sampling emits: the product rule."""
    joint: dict[Hashable, float] = {}
    waiting: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while waiting:
        emitted, mass = waiting.pop()
        if len(emitted) == num_tokens:
            joint[emitted] = mass
            continue
        with torch.no_grad():
            probs = model(torch.tensor([[*PROMPT, *emitted]])).logits[0, -1].softmax(-1).tolist()
        waiting += [((*emitted, token), mass * prob) for token, prob in enumerate(probs)]
    return joint
