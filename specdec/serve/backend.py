"""What the server asks of the serving engine: the part of ``specdec.serving.Engine`` that it uses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any, Protocol

from specdec.serving.engine import EngineMetrics
from specdec.serving.request import Completion, Delta, RequestSettings


class Answer(Protocol):
    """One text that is being generated."""

    def __aiter__(self) -> AsyncIterator[Delta]:
        """What each pass emitted; the last one has a ``finish_reason``. Raises what ended the request."""

    def __await__(self) -> Generator[Any, None, Completion]:
        """The whole, when it is complete."""

    def cancel(self) -> None:
        """Free its row at the next pass; harmless when it is done."""


class Backend(Protocol):
    """Generates texts, many at once."""

    @property
    def tokenizer(self) -> Any | None:
        """The model's tokenizer."""

    @property
    def context_length(self) -> int | None:
        """The most tokens of one text, prompt included; None: no end."""

    @property
    def max_length(self) -> int:
        """The most tokens that it can really hold of one text, prompt included."""

    @property
    def vocab_size(self) -> int:
        """V: token ids are in [0, V)."""

    def submit(
        self, prompt: str | Sequence[int], settings: RequestSettings | None = None, *, request_id: str | None = None
    ) -> Answer:
        """Start a text.

        Raises:
            QueueFullError: too many wait already.
            ValueError: the prompt or the settings cannot be used.
        """

    def metrics(self) -> EngineMetrics:
        """Counts since the start."""
