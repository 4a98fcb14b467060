"""When a row of a batch ends, and how wide the result is: what ``generate()`` does with rows that stop before others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.interfaces import Row


@dataclass(slots=True)
class Ends:
    """The rows of one call that a criterion stopped.

    With an end token among the criteria, ``generate()`` fills a row that has stopped with padding. Without one it lets
    the row go on until every row has stopped, and all of them are as long as the one that stopped last. Rows advance
    by different numbers of tokens here, so one may then have run ahead: the result is cut.
    """

    num_rows: int
    are_padded: bool  # whether rows that have stopped are filled with padding
    _stopped_at: dict[int, int] = field(default_factory=dict)  # row key -> new tokens when it first met a criterion

    def has_stopped(self, row: Row) -> bool:
        """Whether ``row`` has met a criterion, now or earlier."""
        return row.key in self._stopped_at

    def ends(self, row: Row, has_stopped: bool) -> bool:
        """Whether ``row`` ends with its newest token; ``has_stopped``: it meets a criterion there, or did earlier."""
        if self.are_padded:
            return has_stopped
        if has_stopped:
            self._stopped_at.setdefault(row.key, row.num_emitted)
        return self._have_all_stopped and row.num_emitted >= max(self._stopped_at.values())

    def num_new(self, rows: Sequence[Row]) -> int:
        """How many new tokens the longest of ``rows`` has in the result."""
        return max(self._stopped_at.values()) if self._have_all_stopped else max(row.num_emitted for row in rows)

    @property
    def _have_all_stopped(self) -> bool:
        return len(self._stopped_at) == self.num_rows
