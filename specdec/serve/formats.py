"""Answers in OpenAI's words: chat completions and text completions, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from specdec.serve.pieces import Vocabulary
from specdec.serving.request import TokenLogprobs

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI writes this


class Format(Protocol):
    """How one kind of answer is written."""

    @property
    def id(self) -> str:
        """The answer's name."""

    def envelope(self, choices: Sequence[Json], *, is_chunk: bool) -> Json:
        """The object around ``choices``."""

    def opening(self, index: int) -> Json | None:
        """The choice that comes before a streamed text; None: there is none."""

    def piece(self, index: int, text: str, logprobs: Json | None) -> Json:
        """The choice that carries the next part of a streamed text."""

    def ending(self, index: int, reason: str) -> Json:
        """The choice that ends a streamed text."""

    def whole(self, index: int, text: str, logprobs: Json | None, reason: str) -> Json:
        """The choice that holds a whole text."""

    def logprobs(self, index: int, tokens: Sequence[int], told: Sequence[TokenLogprobs]) -> Json:
        """Log-probabilities of the next ``tokens`` of a text."""


class ChatFormat:
    """``chat.completion`` and its chunks."""

    def __init__(self, model: str, words: Vocabulary) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model, self._words, self._created = model, words, int(time.time())

    def envelope(self, choices: Sequence[Json], *, is_chunk: bool) -> Json:
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return _envelope(self.id, kind, self._created, self._model, choices)

    def opening(self, index: int) -> Json | None:
        return _chunk(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, index: int, text: str, logprobs: Json | None) -> Json:
        return _chunk(index, {"content": text}, logprobs, None)

    def ending(self, index: int, reason: str) -> Json:
        return _chunk(index, {}, None, reason)

    def whole(self, index: int, text: str, logprobs: Json | None, reason: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, index: int, tokens: Sequence[int], told: Sequence[TokenLogprobs]) -> Json:
        content = []
        for token, each in zip(tokens, told, strict=True):
            top = [self._named(other, logprob) for other, logprob in each.top]
            content.append(self._named(token, each.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> Json:
        word = self._words.bytes(token)
        return {"token": self._words.text(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(word)}


class TextFormat:
    """``text_completion``, whose chunks have the same name."""

    def __init__(self, model: str, words: Vocabulary) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._model, self._words, self._created = model, words, int(time.time())
        self._offsets: dict[int, int] = {}  # characters of each text so far

    def envelope(self, choices: Sequence[Json], *, is_chunk: bool) -> Json:
        return _envelope(self.id, "text_completion", self._created, self._model, choices)

    def opening(self, index: int) -> Json | None:
        return None

    def piece(self, index: int, text: str, logprobs: Json | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, reason: str) -> Json:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def whole(self, index: int, text: str, logprobs: Json | None, reason: str) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, index: int, tokens: Sequence[int], told: Sequence[TokenLogprobs]) -> Json:
        words, offset = self._words, self._offsets.get(index, 0)
        texts, offsets = [words.text(token) for token in tokens], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        own = [max(each.logprob, LEAST_LOGPROB) for each in told]
        top = [
            {words.text(other): max(logprob, LEAST_LOGPROB) for other, logprob in each.top} | {text: chosen}
            for text, chosen, each in zip(texts, own, told, strict=True)
        ]
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def _chunk(index: int, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _envelope(name: str, kind: str, created: int, model: str, choices: Sequence[Json]) -> Json:
    return {"id": name, "object": kind, "created": created, "model": model, "choices": list(choices)}
