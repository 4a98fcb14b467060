"""Run the application until it is told to stop, and stop it well.

On SIGTERM or Ctrl-C no new connection is accepted and no new request started; those that run have ``grace_s`` seconds
to finish, then their answers end with an error. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from specdec.serve.service import Service

_LAST_WORDS_S = 5  # for the errors that end answers to be written


def bind(host: str, port: int) -> socket.socket:
    """A socket at ``host`` and ``port`` (0: a free one), before anything slow is done for it.

    Raises:
        OSError: the address is taken or not ours.
    """
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port or --host"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, whose running answers are ended well when their time is up."""

    def __init__(self, app: ASGIApp, service: Service, on_start: Callable[[], None]) -> None:
        grace = service.limits.grace_s
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            limit_concurrency=service.limits.max_connections,
            timeout_graceful_shutdown=int(grace) + 1 + _LAST_WORDS_S,
        )
        super().__init__(config)
        self._service, self._on_start = service, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stop()
        asyncio.get_running_loop().call_later(self._service.limits.grace_s, self._service.cut_short)
        await super().shutdown(sockets)
        self._service.close()


def run(app: ASGIApp, service: Service, bound: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM, which returns, or Ctrl-C, which raises KeyboardInterrupt; running answers finish first."""
    with _terminable():
        Server(app, service, on_start).run(sockets=[bound])


@contextmanager
def _terminable() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done: SIGTERM then is no reason to die."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
