"""Text of tokens as they come: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_UNFINISHED = "\ufffd"  # what decoding gives for a part of a character
_MOST_HELD = 8  # tokens of one character; beyond, the bytes are no text and are shown as such


@dataclass(slots=True)
class TextStream:
    """Decodes one row's new tokens. What may yet become a stop string is held back until it is clear.

    Tokens are decoded together with those before them, because many tokenizers put the space before a word into it.
    """

    tokenizer: Any | None
    stop: Sequence[str] = ()
    is_stopped: bool = False
    text: str = ""  # all that was handed out
    _tokens: list[int] = field(default_factory=list)
    _shown: int = 0  # tokens whose text is known
    _context: int = 0  # where decoding begins
    _held: str = ""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` finish. Once a stop string is complete there is no more."""
        if self.tokenizer is None or self.is_stopped:
            return ""
        for token in tokens:
            self._tokens.append(token)
            self._held += self._decoded()
            end = min((at for at in map(self._held.find, self.stop) if at >= 0), default=-1)
            if end >= 0:
                self.is_stopped = True
                return self._hand_out(end)
        return self._hand_out(len(self._held) - self._num_open())

    def end(self) -> str:
        """What was held back and is no stop string after all."""
        if self.tokenizer is None or self.is_stopped:
            return ""
        self._held += self._decoded(is_last=True)
        return self._hand_out(len(self._held))

    def _decoded(self, is_last: bool = False) -> str:
        assert self.tokenizer is not None
        before = self._decode(self._tokens[self._context : self._shown])
        now = self._decode(self._tokens[self._context :])
        is_whole = not now.endswith(_UNFINISHED) or len(self._tokens) - self._shown >= _MOST_HELD
        if len(now) <= len(before) or not (is_whole or is_last):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

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
