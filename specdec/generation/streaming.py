"""The caller's streamer, ended exactly once whatever happens: a thread that reads from it must not wait for ever."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import Any

from torch import Tensor


class Stream:
    """Context manager around a streamer of transformers, or around None, which is shown nothing.

    Args:
        streamer: anything with ``put`` and ``end``.
        has_prompt: whether somebody has shown it the prompt already.

    Raises:
        ValueError: the streamer lacks ``put`` or ``end``.
    """

    def __init__(self, streamer: Any | None, has_prompt: bool = False) -> None:
        if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise ValueError(
                f"streamer must have the methods put and end, as transformers.TextStreamer has, got {streamer!r}"
            )
        self._streamer = streamer
        self._has_prompt = has_prompt
        self._is_ended = streamer is None

    @property
    def is_open(self) -> bool:
        """Whether somebody listens."""
        return not self._is_ended

    def put_prompt(self, input_ids: Tensor) -> None:
        """Show the prompts (B, L), which come first."""
        if not self._has_prompt:
            self.put(input_ids)

    def put(self, tokens: Tensor) -> None:
        """Show the next token of every row (B,)."""
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())

    def end(self) -> None:
        """Tell the streamer that nothing follows."""
        if not self._is_ended:
            self._is_ended = True
            self._streamer.end()  # type: ignore[union-attr]

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        else:
            with suppress(Exception):  # the first error is the one to hear of
                self.end()
