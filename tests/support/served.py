"""A server on a free port, in a thread, and ways to ask it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

from specdec.serve.app import make_app
from specdec.serve.backend import Backend
from specdec.serve.limits import Limits
from specdec.serve.run import Server, bind, url_of
from specdec.serve.service import Defaults, Service

HELLO = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> Any:
        return self.json["error"]


class Served:
    """Serves ``engine`` while its block lasts."""

    def __init__(
        self,
        engine: Backend,
        limits: Limits | None = None,
        defaults: Defaults | None = None,
        *,
        name: str = "tiny",
        **app: Any,
    ) -> None:
        self.engine = engine
        self.service = Service(engine, name, defaults or Defaults(), limits or Limits(grace_s=0))
        self._socket = bind("127.0.0.1", 0)
        self.url = url_of(self._socket)
        self.port: int = self._socket.getsockname()[1]
        self._ready = threading.Event()
        self._server = Server(make_app(self.service, **app), self.service, self._ready.set)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def ask(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str = "") -> Answered:
        """One request; ``body`` is JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        told = {"Content-Type": "application/json", **(headers or {})}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, told)
            answer = connection.getresponse()
            return Answered(answer.status, dict(answer.getheaders()), answer.read().decode())
        finally:
            connection.close()

    def chat(self, **fields: Any) -> Answered:
        """POST /v1/chat/completions, by default of "hello" and four tokens."""
        return self.ask("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "max_tokens": 4, **fields})

    def metric(self, name: str, **labels: str) -> float:
        """One number of /metrics."""
        for line in self.ask("/metrics").text.splitlines():
            if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)


def events_of(text: str) -> Iterator[Any]:
    """The objects of a stream of events, ``[DONE]`` as text."""
    for part in text.split("\n\n"):
        if part:
            data = part.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def until(is_true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until ``is_true``; fail if it takes longer than ``seconds``."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
