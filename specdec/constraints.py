"""What a row's text must keep to, as the loop, its distributions and its drafters see it.

Grammars of a library stand behind these protocols (specdec.grammar); nothing here knows one. V is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class GrammarState(Protocol):
    """Where in its grammar one text is. Tokens that end a text may follow a complete one, and then nothing else does.

    Every method may raise GrammarError: the backend has met one of its limits.
    """

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""

    def allowed(self) -> Tensor:
        """(V,) bool on the host: the tokens that may follow."""

    def accept(self, token: int) -> bool:
        """Go on behind ``token``; False leaves the state as it was: the text cannot go on with it."""

    def rollback(self, num_tokens: int) -> None:
        """Take the latest ``num_tokens`` accepted tokens back."""

    def fork(self) -> GrammarState:
        """A state of the same text that goes its own way from here."""

    def forced(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that follow: certainly, or as the tokenizer writes the text that is certain."""

    def options(self, most: int) -> list[int]:
        """The ways in which the text can go on, each by its longest token; [] if there are more than ``most``."""


class TextGrammar(Protocol):
    """The grammar of one row, wherever in its text or in a tree behind it one asks."""

    def at(self, tokens: Sequence[int], path: Sequence[int] = ()) -> GrammarState:
        """The state behind the row's ``tokens``, prompt included, and ``path``; the next call may move it.

        Raises:
            GrammarError: the grammar does not allow this text.
        """

    def find(self, tokens: Sequence[int], path: Sequence[int] = ()) -> GrammarState | None:
        """The same, or None if the grammar does not allow this text."""
