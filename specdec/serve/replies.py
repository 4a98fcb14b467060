"""Answers on their way to the client: as one object, or as server-sent events while they are generated.

Whoever reads too slowly or goes away frees the rows of its request.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from specdec.serve.bodies import Body
from specdec.serve.errors import ApiError, bad
from specdec.serve.formats import Json
from specdec.serve.jobs import Part
from specdec.serve.monitor import Monitor
from specdec.serve.pieces import Pieces
from specdec.serve.service import Service, Started
from specdec.serve.usage import speculation_of, usage_of
from specdec.serving.request import FinishReason

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Reply:
    """The answer to one request."""

    def __init__(self, service: Service, monitor: Monitor, body: Body, started: Started) -> None:
        self._service, self._monitor, self._body = service, monitor, body
        self._job, self._format = started.job, started.format
        self._prompts = started.prompts
        self._pieces = [Pieces(service.words) for _ in started.job.answers]

    def response(self) -> Response:
        """As the client asked for it."""
        return EventStream(self) if self._body.stream else WholeAnswer(self)

    async def whole(self) -> Json:
        """One object with all texts. Raises ApiError."""
        texts = [""] * len(self._job.answers)
        logprobs: list[list[Json]] = [[] for _ in texts]
        reasons: dict[int, str] = {}
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                texts[part.index] += part.delta.text
                if (told := self._logprobs(part)) is not None:
                    logprobs[part.index].append(told)
                if part.delta.finish_reason is not None:
                    reasons[part.index] = part.delta.finish_reason
        done = await self._job.completions()
        choices = []
        for i, text in enumerate(texts):
            choice = self._format.whole(i, text, _joined(logprobs[i]), reasons[i])
            choices.append(choice | ({"token_ids": list(done[i].tokens)} if self._body.return_token_ids else {}))
        answer = self._format.envelope(choices, is_chunk=False)
        return answer | {"usage": usage_of(done, self._body.num_choices)} | self._prompt_ids()

    async def events(self) -> AsyncGenerator[str, None]:
        """The data of each event, the closing ``[DONE]`` included; what goes wrong on the way is an event as well."""
        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    yield _dump(chunk)
        except ApiError as error:
            yield _dump(error.content)
        else:
            yield "[DONE]"

    def end(self) -> None:
        """Free what is left of the request."""
        self._service.finish(self._job)

    @property
    def stall_timeout_s(self) -> float:
        return self._service.limits.stall_timeout_s

    async def _chunks(self) -> AsyncGenerator[Json, None]:
        form, extra = self._format, self._prompt_ids()  # in the first chunk
        for i in range(len(self._job.answers)):
            if (opening := form.opening(i)) is not None:
                yield self._chunk(opening) | extra
                extra = {}
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                if (piece := self._piece(part)) is not None:
                    yield self._chunk(piece) | extra
                    extra = {}
                if part.delta.finish_reason is not None:
                    yield self._chunk(form.ending(part.index, part.delta.finish_reason))
        if self._body.is_usage_streamed:
            usage = usage_of(await self._job.completions(), self._body.num_choices)
            yield form.envelope([], is_chunk=True) | {"usage": usage}

    def _chunk(self, choice: Json) -> Json:
        usage = {"usage": None} if self._body.is_usage_streamed else {}
        return self._format.envelope([choice], is_chunk=True) | usage

    def _piece(self, part: Part) -> Json | None:
        """The choice for what a pass emitted; None if there is nothing to tell."""
        delta = part.delta
        extra: Json = {}
        logprobs = self._logprobs(part)
        if self._body.return_token_ids:
            extra["token_ids"] = list(delta.tokens)
        if self._body.speculation and delta.step is not None:
            extra["speculation"] = speculation_of(
                delta.step, delta.tokens, self._pieces[part.index], self._service.words
            )
        if not (delta.text or logprobs or extra):
            return None
        return self._format.piece(part.index, delta.text, logprobs) | extra

    def _logprobs(self, part: Part) -> Json | None:
        if self._body.num_logprobs is None or not part.delta.tokens:
            return None
        return self._format.logprobs(part.index, part.delta.tokens, part.delta.logprobs)

    def _prompt_ids(self) -> Json:
        """vLLM's ``prompt_token_ids``; several prompts give a list of lists."""
        if not self._body.return_token_ids:
            return {}
        return {"prompt_token_ids": self._prompts[0] if len(self._prompts) == 1 else self._prompts}

    async def _parts(self) -> AsyncGenerator[Part, None]:
        """What the passes emit, measured; every failure becomes an ApiError."""
        clocks = [self._monitor.clock() for _ in self._job.answers]
        try:
            async with aclosing(self._job.parts()) as parts:
                async for part in parts:
                    if part.delta.finish_reason is FinishReason.ERROR:
                        continue  # what it was is raised next
                    if part.delta.finish_reason is FinishReason.CANCELLED:
                        raise _failed(part.delta.finish_reason)
                    clocks[part.index].tick(part.delta)
                    yield part
            for clock, completion in zip(clocks, await self._job.completions(), strict=True):
                clock.finish(completion)
        except ApiError:
            raise
        except ValueError as error:
            raise bad(None, str(error)) from error
        except Exception as error:
            _LOG.exception("the engine failed on %s", self._format.id)
            raise _failed("error") from error


class WholeAnswer(Response):
    """One JSON object, when all of it is there."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await _unless_gone(self._answer(), receive)
        finally:
            self._reply.end()
        if answer is not None:
            await answer(scope, receive, send)

    async def _answer(self) -> Response:
        try:
            return JSONResponse(await self._reply.whole())
        except ApiError as error:
            return error.response()


class EventStream(Response):
    """Server-sent events."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
        )
        del self.headers["content-length"]
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(self._send(send), receive)
        finally:
            self._reply.end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._reply.events()) as events:
            async for data in events:
                async with asyncio.timeout(self._reply.stall_timeout_s):
                    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(work: Awaitable[T], receive: Receive) -> T | None:
    """What ``work`` returns, or None if the client goes away first, or stops reading."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return None
        try:
            return working.result()
        except TimeoutError:  # of a single write
            return None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _failed(reason: str) -> ApiError:
    return ApiError(500, f"the answer ended early ({reason})", code=reason)


def _joined(told: list[Json]) -> Json | None:
    """Log-probabilities of the passes of one text, one after another."""
    if not told:
        return None
    joined: Json = {}
    for name, first in told[0].items():
        joined[name] = [item for each in told for item in each[name]] if isinstance(first, list) else first
    return joined


def _dump(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
