"""What ``Engine.submit`` returns: the request's tokens as they come, in threads and in coroutines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from threading import Condition
from typing import Any

from specdec.serving.request import Completion, Delta, FinishReason


class Handle:
    """One request. It may be iterated by several readers; each sees all that was emitted.

    A reader that does not read holds nobody up.
    """

    def __init__(self, completion: Completion, on_cancel: Callable[[], None]) -> None:
        self.request_id = completion.request_id
        self._completion = completion
        self._on_cancel = on_cancel
        self._deltas: list[Delta] = []
        self._changed = Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._error: BaseException | None = None
        self._is_done = False

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._is_done

    def cancel(self) -> None:
        """End the request at the next pass; what it has is its result. Nothing happens if it has ended."""
        if not self._is_done:
            self._on_cancel()

    def result(self, timeout: float | None = None) -> Completion:
        """The whole answer, once it is complete.

        Raises:
            TimeoutError: it was not within ``timeout`` seconds; the request goes on.
            Exception: what ended the request.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._is_done:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"request {self.request_id} is not complete after {timeout} s; it goes on")
                self._changed.wait(left)
        return self._ended()

    def __iter__(self) -> Iterator[Delta]:
        seen = 0
        while True:
            with self._changed:
                while seen == len(self._deltas) and not self._is_done:
                    self._changed.wait()
                new, is_done = self._deltas[seen:], self._is_done
            yield from new
            seen += len(new)
            if is_done and seen == len(self._deltas):
                self._ended()
                return

    async def __aiter__(self) -> AsyncIterator[Delta]:
        waiting = asyncio.get_running_loop(), asyncio.Event()
        seen = 0
        with self._changed:
            self._waiting.append(waiting)
        try:
            while True:
                waiting[1].clear()
                with self._changed:
                    new, is_done = self._deltas[seen:], self._is_done
                for delta in new:
                    yield delta
                seen += len(new)
                if is_done and seen == len(self._deltas):
                    self._ended()
                    return
                await waiting[1].wait()
        finally:
            with self._changed:
                self._waiting.remove(waiting)

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._whole().__await__()

    async def _whole(self) -> Completion:
        async for _ in self:
            pass
        return self._ended()

    def _ended(self) -> Completion:
        if self._error is not None:
            raise self._error
        return self._completion

    # The engine's side.

    def push(self, delta: Delta, error: BaseException | None = None) -> None:
        """Hand ``delta`` to all readers; one with a finish reason is the last, and ``error`` is then raised in them."""
        completion = self._completion
        completion.tokens += delta.tokens
        completion.text += delta.text
        completion.logprobs += delta.logprobs
        if delta.step is not None:
            completion.stats.add(delta.step)
        with self._changed:
            self._deltas.append(delta)
            if delta.finish_reason is not None:
                completion.finish_reason = delta.finish_reason
                self._error, self._is_done = error, True
                if error is not None:
                    assert delta.finish_reason is FinishReason.ERROR
            self._changed.notify_all()
            for loop, event in self._waiting:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)
