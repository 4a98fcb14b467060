"""Text for the user: lines of progress, and tokens as they come, put together as in the whole text."""

from __future__ import annotations

import sys
from typing import Any


class TextStream:
    """Decodes one token after another; the pieces put together are the text of the whole.

    Each token is decoded together with the piece before it, because a tokenizer may merge spaces or bytes over the
    border.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the piece before begins here
        self._done = 0  # tokens that were shown

    def push(self, token: int) -> str:
        """The text that became certain with ``token``; empty while a character is incomplete."""
        self._ids.append(token)
        before, now = self._decode(self._done), self._decode(len(self._ids))
        if now.endswith("\ufffd") or len(now) <= len(before):
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


def tell(line: str) -> None:
    """Progress for the user, apart from what a command prints."""
    print(line, file=sys.stderr, flush=True)
