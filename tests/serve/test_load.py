"""Many clients, slow ones, and ones that leave: nobody holds up the others, and rows are freed."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from served import HELLO, Served, events_of, until
from tinychat import make_tokenizer

from specdec.errors import NonFiniteLogitsError
from specdec.serve.limits import Limits

TOKENIZER = make_tokenizer()


def start(served: Served, **fields: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream of which the head was read."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    body = {"messages": HELLO, "max_tokens": 4000, "stream": True, **fields}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    return connection, response


def test_fifty_clients_at_once_get_what_each_would_get_alone() -> None:
    engine = FakeEngine(TOKENIZER, pass_s=0.002, max_rows=8)
    with Served(engine) as served, ThreadPoolExecutor(50) as pool:
        client = served.client()

        def one(number: int) -> str:
            asked: dict[str, Any] = {
                "model": "tiny", "messages": [{"role": "user", "content": f"number {number}"}], "max_tokens": 20 + number % 7,
            }  # fmt: skip
            if number % 2:
                return client.chat.completions.create(**asked).choices[0].message.content or ""
            chunks = client.chat.completions.create(**asked, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        together = list(pool.map(one, range(50)))
        assert together == [one(number) for number in range(50)]
        assert len(set(together)) > 10
        until(lambda: served.metric("vllm:request_success_total", finished_reason="length") == 100)
        assert served.metric("vllm:num_requests_running") == 0
    engine.close()


def test_too_many_waiting_requests_are_told_when_to_come_back() -> None:
    engine = FakeEngine(TOKENIZER, pass_s=0.02, max_rows=1, max_waiting=1)
    with Served(engine) as served:
        running = start(served)
        until(lambda: len(engine.running) == 1)
        waiting = start(served)
        with pytest.raises(openai.RateLimitError) as caught:
            served.client().chat.completions.create(model="tiny", messages=HELLO)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        # A request of several texts is refused as a whole: none of them may stay behind.
        running[0].close()
        until(lambda: len(engine.asked) == 2 and engine.asked[0].is_done)
        assert served.chat(n=2).status == 429
        until(lambda: engine.asked[2].is_cancelled)
        waiting[0].close()
    engine.close()


def test_requests_that_wait_for_the_tokenizer_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not in the engine yet, whose limit would never see them."""
    engine = FakeEngine(TOKENIZER)
    with Served(engine, Limits(max_starting=2, grace_s=0)) as served, ThreadPoolExecutor(4) as pool:
        gate = threading.Event()
        monkeypatch.setattr(served.service.prompts, "_render", lambda body: gate.wait(10) and [1, 2, 3])
        asking = [pool.submit(served.chat) for _ in range(4)]
        until(lambda: sum(each.done() for each in asking) == 2)
        gate.set()
        assert sorted(each.result().status for each in asking) == [200, 200, 429, 429]
        assert served.chat().status == 200
    engine.close()


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_frees_its_rows(is_streamed: bool) -> None:
    engine = FakeEngine(TOKENIZER, pass_s=0.01)
    with Served(engine) as served:
        body = json.dumps({"messages": HELLO, "max_tokens": 4000, "n": 2, "stream": is_streamed}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(head.encode() + body)
            until(lambda: len(engine.running) == 2)
        until(lambda: not engine.running)
        assert [answer.is_cancelled for answer in engine.asked] == [True, True]
        assert served.metric("vllm:request_success_total", finished_reason="abort") == 2
    engine.close()


def test_a_reader_that_stops_reading_frees_its_row_and_holds_nobody_up() -> None:
    """Its events fill the buffers of both sides; then the next write must not wait for ever."""
    engine = FakeEngine(TOKENIZER, pass_s=0.001, width=1, padding=100_000)
    with Served(engine, Limits(stall_timeout_s=0.5, grace_s=0)) as served:
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", served.port))
        body = json.dumps({"messages": HELLO, "max_tokens": 4000, "stream": True}).encode()
        stuck.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: len(engine.running) == 1)
        assert served.chat(max_tokens=3).status == 200
        until(lambda: engine.asked[0].is_cancelled)
        until(lambda: not engine.running)
        assert len(engine.asked[0].tokens) < 4000
        stuck.close()
    engine.close()


def test_a_slow_reader_gets_everything() -> None:
    engine = FakeEngine(TOKENIZER, padding=5_000)
    with Served(engine, Limits(stall_timeout_s=5)) as served:
        connection, response = start(served, max_tokens=40)
        read = bytearray()
        while piece := response.read1(20_000):
            read += piece
            time.sleep(0.005)
        connection.close()
    *chunks, done = events_of(read.decode())
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == engine.asked[0].text
    engine.close()


def test_a_request_that_takes_too_long_ends_with_an_error() -> None:
    engine = FakeEngine(TOKENIZER, pass_s=0.05)
    with Served(engine, Limits(request_timeout_s=0.3)) as served:
        whole = served.chat(max_tokens=4000)
        assert (whole.status, whole.error["code"]) == (504, "timeout")
        *_, last = events_of(served.chat(max_tokens=4000, stream=True).text)
        assert last["error"]["code"] == "timeout"
        until(lambda: not engine.running)
        assert served.chat(max_tokens=2).status == 200
    engine.close()


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        (RuntimeError("secret path"), 500, "ended early"),
        (NonFiniteLogitsError("every token is excluded"), 400, "excluded"),
    ],
)
def test_a_failure_of_the_engine_is_told_without_its_secrets(failure: Exception, status: int, words: str) -> None:
    engine = FakeEngine(TOKENIZER, failure=failure)
    with Served(engine) as served:
        whole = served.chat()
        assert (whole.status, words in whole.error["message"], "secret" in whole.text) == (status, True, False)
        *_, last = events_of(served.chat(stream=True).text)
        assert words in last["error"]["message"]
        with pytest.raises(openai.APIError, match=words):
            list(served.client().chat.completions.create(model="tiny", messages=HELLO, stream=True))
        assert served.ask("/health").status == 200
    engine.close()


def test_one_failing_text_ends_its_siblings() -> None:
    engine = FakeEngine(TOKENIZER, failure=RuntimeError("x"))
    with Served(engine) as served:
        assert served.chat(n=3).status == 500
        until(lambda: not engine.running)
    engine.close()


def test_a_faulty_route_answers_in_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(TOKENIZER)

    def fail() -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "metrics", fail)
    with Served(engine) as served:
        answer = served.ask("/metrics")
        assert (answer.status, answer.error["type"]) == (500, "server_error")
    engine.close()


# ----- the end -----


def ended(server: Served, act: Callable[[], Any]) -> tuple[Any, float]:
    """What ``act`` returned while the server was told to stop 0.2 s after it began, and how long the stop took."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    server.__exit__()
    seconds = time.monotonic() - began
    thread.join(10)
    return results[0], seconds


def test_running_answers_may_finish_when_the_server_stops() -> None:
    engine = FakeEngine(TOKENIZER, pass_s=0.02)
    server = Served(engine, Limits(grace_s=20)).__enter__()
    connection, response = start(server, max_tokens=60)
    text, seconds = ended(server, lambda: response.read().decode())
    connection.close()
    *_, ending, done = events_of(text)
    assert (ending["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert seconds < 10
    engine.close()


def test_what_does_not_finish_in_time_ends_with_an_error() -> None:
    engine = FakeEngine(TOKENIZER, pass_s=0.02)
    server = Served(engine, Limits(grace_s=0.5)).__enter__()
    connection, response = start(server)
    whole = ThreadPoolExecutor(1).submit(server.chat, max_tokens=4000)
    text, seconds = ended(server, lambda: response.read().decode())
    connection.close()
    *_, last = events_of(text)
    assert last["error"]["code"] == "shutting_down"
    assert (whole.result().status, whole.result().error["code"]) == (503, "shutting_down")
    assert 0.4 < seconds < 8
    until(lambda: not engine.running)
    engine.close()


def test_a_server_that_stops_takes_no_new_requests() -> None:
    engine = FakeEngine(TOKENIZER)
    with Served(engine) as served:
        served.service.stop()
        answer = served.chat()
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "shutting_down", "5")
        assert served.ask("/health").status == 503
    engine.close()
