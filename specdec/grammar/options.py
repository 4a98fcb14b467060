"""The few ways in which a text can go on, where a grammar leaves a choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

_MANY = 64  # allowed tokens: more are a free text, or nearly one
Text = TypeVar("Text", str, bytes)


def longest(mask: Tensor, most: int, text_of: Callable[[int], Text]) -> list[int]:
    """The tokens that ``mask`` (V,) allows and whose text begins no other one's: what a tokenizer would most likely take.

    A boolean has two, though its first letters are tokens as well. [] if there are more than ``most``.
    """
    if int(mask.sum()) > _MANY:
        return []
    tokens = mask.nonzero().flatten().tolist()
    texts = [text_of(token) for token in tokens]
    found = [
        token
        for token, text in zip(tokens, texts, strict=True)
        if not any(len(other) > len(text) and other.startswith(text) for other in texts)
    ]
    return found if len(found) <= most else []
