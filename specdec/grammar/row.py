"""The grammar of one row: its state goes wherever in the row's text, or in a tree behind it, somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.constraints import GrammarState
from specdec.errors import GrammarError
from specdec.interfaces import Row


@dataclass(slots=True)
class RowGrammar:
    """Follows the text of one row: attach it as ``row.grammar``, at any time, and to one row only.

    The state is moved by what tells two places apart: it takes back the tokens behind their common prefix, and accepts
    those of the new place. So it advances once for every kept token, however often and in whatever order nodes of
    trees are asked about in between, and where it stands depends on the text alone.

    Args:
        state: of an empty text; this object takes it over.
        start: how many tokens of the row stand before the text that the grammar is about, usually its prompt.
    """

    state: GrammarState
    start: int
    _taken: list[int] = field(default_factory=list)

    def at(self, tokens: Sequence[int], path: Sequence[int] = ()) -> GrammarState:
        state = self.find(tokens, path)
        if state is None:
            raise GrammarError(
                f"the text leaves its grammar at token {len(self._taken)}: a token was kept that the mask excludes"
            )
        return state

    def find(self, tokens: Sequence[int], path: Sequence[int] = ()) -> GrammarState | None:
        wanted = [*tokens[self.start :], *path]
        num_common = _common(self._taken, wanted)
        if num_common < len(self._taken):
            self.state.rollback(len(self._taken) - num_common)
            del self._taken[num_common:]
        for token in wanted[num_common:]:
            if not self.state.accept(token):
                return None
            self._taken.append(token)
        return self.state


def finish_reason(row: Row, ends: Sequence[int]) -> str:
    """Why ``row`` ended: "stop", "length", or "incomplete" if something else ended it inside its grammar.

    A text that was cut off is never called whole, even where its grammar would have let it end there.
    """
    if row.num_emitted and row.tokens[-1] in ends:
        return "stop"
    if row.num_left <= 0:
        return "length"
    return "stop" if row.grammar is None or row.grammar.at(row.tokens).is_complete else "incomplete"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
