"""One request as the engine sees it: several texts, whose passes come in as they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from specdec.serve.backend import Answer
from specdec.serve.errors import ApiError
from specdec.serving.request import Completion, Delta


@dataclass(frozen=True, slots=True)
class Part:
    """What one pass emitted for one of the texts."""

    index: int  # of the text
    delta: Delta


class Job:
    """The texts of one request. They end together: when the client has gone, when time is up, when the server stops."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = tuple(answers)
        self._queue: asyncio.Queue[Part | Exception | None] = asyncio.Queue()

    async def parts(self) -> AsyncGenerator[Part, None]:
        """What the passes emit, of all texts as it comes. Raises what ended one of them, and cancels the others."""
        tasks = [asyncio.create_task(self._read(i, answer)) for i, answer in enumerate(self.answers)]
        try:
            num_open = len(tasks)
            while num_open:
                item = await self._queue.get()
                if item is None:
                    num_open -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def completions(self) -> list[Completion]:
        """The texts as a whole; call it when ``parts`` has ended."""
        return [await answer for answer in self.answers]

    def cancel(self) -> None:
        """Free the rows; those that are done already notice nothing."""
        for answer in self.answers:
            answer.cancel()

    def stop(self, error: ApiError) -> None:
        """End the answer with ``error``, whatever the engine is doing."""
        self._queue.put_nowait(error)
        self.cancel()

    async def _read(self, index: int, answer: Answer) -> None:
        try:
            async for delta in answer:
                self._queue.put_nowait(Part(index, delta))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # the engine hands on whatever ended the request, in its thread
            self._queue.put_nowait(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        else:
            self._queue.put_nowait(None)
