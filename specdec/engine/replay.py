"""What an engine asks of passes that were recorded: it runs one from its recording where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from specdec.engine.cache import RaggedCache
from specdec.engine.hidden_states import HiddenStateHooks
from specdec.engine.masks import MaskStyle
from specdec.engine.passes import RowPass
from specdec.interfaces import Scores


class Replay(Protocol):
    """The recorded passes over one cache."""

    @property
    def needs_check(self) -> bool:
        """Whether the latest scores are to be compared with an ordinary pass (see ``check``)."""

    def score(
        self, model: Any, row_passes: Sequence[RowPass], cache: RaggedCache, capture: HiddenStateHooks
    ) -> list[Scores] | None:
        """Scores of ``parts``, which stand in neighbouring lines of ``cache``; None: take the ordinary path."""

    def check(self, replayed: Sequence[Scores], ordinary: Sequence[Scores]) -> None:
        """Compare a replay with an ordinary pass over the same parts."""


class ReplayPool(Protocol):
    """Lends each engine on one model a cache and the passes recorded over it; nobody else has them meanwhile."""

    def borrow(self, style: MaskStyle, new_cache: Callable[[], RaggedCache]) -> tuple[RaggedCache, Replay]:
        """Those that an earlier engine gave back, or new ones."""

    def give_back(self, cache: RaggedCache, replay: Replay) -> None:
        """Leave them to the next engine."""

    def beside(self, model: Any) -> ReplayPool:
        """The same for another model, such as a draft model."""
