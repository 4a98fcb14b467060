"""Text of tokens as they come: whole characters, put together as in the whole text."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"  # what decoding gives for a part of a character


class TextStream:
    """Decodes one token after another; the pieces put together are the text of the whole.

    Each token is decoded together with the piece before it, because a tokenizer may merge spaces or bytes over the
    border.

    Args:
        tokenizer: of transformers.
        most_held: tokens that one character may take; more are no text and are shown as they are. None: any number.
    """

    def __init__(self, tokenizer: Any, most_held: int | None = None) -> None:
        self._tokenizer, self._most_held = tokenizer, most_held
        self._ids: list[int] = []
        self._start = 0  # the piece before begins here
        self._done = 0  # tokens that were shown

    def push(self, token: int) -> str:
        """The text that became certain with ``token``; empty while a character is incomplete."""
        self._ids.append(token)
        before, now = self._decode(self._done), self._decode(len(self._ids))
        is_open = now.endswith(_UNFINISHED) and (
            self._most_held is None or len(self._ids) - self._done < self._most_held
        )
        if is_open or len(now) <= len(before):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What still waits, as it is."""
        rest = self._decode(len(self._ids))[len(self._decode(self._done)) :]
        self._start = self._done = len(self._ids)
        return rest

    def _decode(self, end: int) -> str:
        ids = self._ids[self._start : end]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
