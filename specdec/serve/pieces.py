"""Single tokens as text and as bytes, for log-probabilities and for the page that shows what was drafted."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import Any


class Vocabulary:
    """What each token id of a tokenizer stands for."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset() if tokenizer is None else frozenset(tokenizer.all_special_ids)
        self._byte_of = _byte_alphabet()
        self.text = lru_cache(1 << 16)(self._text)
        self.bytes = lru_cache(1 << 16)(self._bytes)

    def is_special(self, token: int) -> bool:
        """Whether it is left out of texts: ends, roles and the like."""
        return token in self._special

    def _text(self, token: int) -> str:
        """The token alone; the replacement character for a part of a character."""
        if self._tokenizer is None:
            return f"<{token}>"
        text: str = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        name = self._name(token)
        return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text

    def _bytes(self, token: int) -> bytes:
        """Its bytes; of a byte-level or byte-fallback token exactly those that it stands for."""
        name = self._name(token)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        text = self.text(token)
        if "\ufffd" in text and all(letter in self._byte_of for letter in name):
            return bytes(self._byte_of[letter] for letter in name)
        return text.encode()

    def _name(self, token: int) -> str:
        return "" if self._tokenizer is None else str(self._tokenizer.convert_ids_to_tokens(token))


class Pieces:
    """Splits a text into the pieces of its tokens; a character belongs to the token that completes it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def split(self, tokens: Sequence[int]) -> list[str]:
        """One piece for each token, empty for special ones."""
        words = self._vocabulary
        return ["" if words.is_special(each) else self._decoder.decode(words.bytes(each)) for each in tokens]


def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level vocabularies write for each byte. Source: GPT-2's ``bytes_to_unicode``."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
