"""What stands before everything: who may ask, and how large a request may be.

Plain ASGI, so that a body that is too large or too slow is refused before anything reads it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.serve.errors import ApiError, bad
from specdec.serve.limits import Limits

OPEN = frozenset({"/", "/health"})  # without a key: the page, which asks for one, and the load balancer's question
_DRAIN_S = 5.0  # how long the rest of a refused body is read, so that its sender can read the answer
_DRAIN_BYTES = 64 << 20


class Gate:
    """Lets requests through to ``app`` that have the key, a host name that is ours, and a body within the limits.

    A server on loopback answers to loopback names only: a page from elsewhere cannot reach it under a name of its own
    that it lets point here. ``hosts`` are further names, for a proxy that passes its own on.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None, *, is_loopback: bool, hosts: Iterable[str] = ()
    ) -> None:
        self._app, self._limits = app, limits
        self._key = None if api_key is None else api_key.encode()
        self._is_loopback, self._hosts = is_loopback, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers.get("host", ""))
            if scope["path"] not in OPEN and scope["method"] != "OPTIONS":
                self._check_key(headers.get("authorization", ""))
            if scope["method"] == "POST":
                receive = await self._read(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except _GoneError:
            return
        await self._app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        name = host.rsplit(":", 1)[0] if host.rsplit(":", 1)[-1].isdigit() else host
        if self._is_loopback and name not in self._hosts and not is_loopback(name.strip("[]")):
            raise ApiError(403, f"this server answers to loopback names only, not to {name!r}; see --allowed-host")

    def _check_key(self, authorization: str) -> None:
        if self._key is None:
            return
        scheme, _, given = authorization.partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self._key)  # takes as long whatever was given
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(
                401,
                "missing or wrong API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, headers: Headers, receive: Receive) -> Receive:
        """Take in the whole body; the returned ``receive`` hands it out again, then goes on with the connection."""
        limit = self._limits.max_body_bytes
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the body must be application/json, got {kind or 'no content type'}")
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit and headers.get("expect", "").lower() == "100-continue":
            raise _too_large(limit)  # nothing of it was sent yet
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while (message := await _more(receive)) is not None:
                    body += message.get("body", b"")
                    if len(body) > limit:
                        await _drain(receive, message)
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self._limits.body_timeout_s:g} s to arrive") from None
        if not body:
            raise bad(None, "the body is empty; send a JSON object")
        parts = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return parts.pop() if parts else await receive()

        return again


class _GoneError(Exception):
    """The client left before its request was complete."""


async def _more(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise _GoneError
    return message


async def _drain(receive: Receive, message: Message) -> None:
    """Read on for a while and forget it: a sender that is cut off in the middle does not read why."""
    read = 0
    try:
        async with asyncio.timeout(_DRAIN_S):
            while message.get("more_body", False) and read < _DRAIN_BYTES:
                message = await _more(receive)
                read += len(message.get("body", b""))
    except TimeoutError:
        pass


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes", code="body_too_large", headers={"Connection": "close"}
    )


def is_loopback(name: str) -> bool:
    """Whether ``name`` is this machine, seen from itself."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
