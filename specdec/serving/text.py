"""The text of one answer as it comes: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.text import TextStream

_MOST_HELD = 8  # tokens of one character; beyond, the bytes are no text and are shown as such


@dataclass(slots=True)
class AnswerText:
    """Decodes one row's new tokens. What may yet become a stop string is held back until it is clear."""

    tokenizer: Any | None  # None: no text
    stop: Sequence[str] = ()
    is_stopped: bool = False
    text: str = ""  # all that was handed out
    _pieces: TextStream = field(init=False)
    _held: str = ""

    def __post_init__(self) -> None:
        self._pieces = TextStream(self.tokenizer, _MOST_HELD)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` finish. Once a stop string is complete there is no more."""
        if self.tokenizer is None or self.is_stopped:
            return ""
        for token in tokens:
            self._held += self._pieces.push(token)
            end = min((at for at in map(self._held.find, self.stop) if at >= 0), default=-1)
            if end >= 0:
                self.is_stopped = True
                return self._hand_out(end)
        return self._hand_out(len(self._held) - self._num_open())

    def end(self) -> str:
        """What was held back and is no stop string after all."""
        if self.tokenizer is None or self.is_stopped:
            return ""
        self._held += self._pieces.flush()
        return self._hand_out(len(self._held))

    def _num_open(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = min(max(map(len, self.stop), default=1) - 1, len(self._held))
        for size in range(longest, 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self.stop):
                return size
        return 0

    def _hand_out(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        self.text += text
        return text
