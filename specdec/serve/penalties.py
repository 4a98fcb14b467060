"""Penalties and biases of OpenAI's interface, as processors of one row: (1, L), (1, V) -> (1, V).

Each depends on the row's tokens alone, so it is exact under speculation: the engine asks it with the path of each node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.serve.bodies import Body
from specdec.serve.errors import bad


class TokenPenalty:
    """Takes ``frequency`` off a logit each time its token was generated, and ``presence`` once if it ever was.

    Source: OpenAI's API reference, "frequency and presence penalties". The prompt does not count.
    """

    is_rowwise = True

    def __init__(self, num_prompt: int, frequency: float, presence: float) -> None:
        self._num_prompt, self._frequency, self._presence = num_prompt, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (1, L), (1, V)
        counts = torch.zeros_like(scores).index_add_(
            1, input_ids[0, self._num_prompt :], torch.ones_like(scores[:, : input_ids.shape[1] - self._num_prompt])
        )
        return scores - self._frequency * counts - self._presence * (counts > 0)


class TokenBias:
    """Adds to the logits of some tokens; -100 and less bans one."""

    is_rowwise = True

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(biases))
        self._values = torch.tensor([-float("inf") if value <= -100 else value for value in biases.values()])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (1, L), (1, V)
        biased = scores.clone()
        biased[0, self._ids.to(scores.device)] += self._values.to(scores)
        return biased


def processors_of(body: Body, repetition_penalty: float, num_prompt: int, vocab_size: int) -> tuple[Any, ...]:
    """What changes the logits of this request, in the order of generate(): penalties, then biases.

    Raises:
        ApiError: a bias for something that is no token.
    """
    found: list[Any] = []
    if repetition_penalty != 1.0:
        from transformers import RepetitionPenaltyLogitsProcessor

        found.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if body.frequency_penalty or body.presence_penalty:
        found.append(TokenPenalty(num_prompt, body.frequency_penalty or 0.0, body.presence_penalty or 0.0))
    if body.logit_bias:
        found.append(TokenBias(_biases(body.logit_bias, vocab_size)))
    return tuple(found)


def _biases(asked: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    biases = {}
    for name, value in asked.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise bad("logit_bias", f"logit_bias: {name!r} is not a token id in [0, {vocab_size})")
        if not -100 <= value <= 100:
            raise bad("logit_bias", f"logit_bias must be in [-100, 100], got {value} for token {name}")
        biases[int(name)] = value
    return biases
