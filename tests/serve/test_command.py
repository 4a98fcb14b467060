"""``specdec serve``: a process that serves, stops when it is told to, and says what is wrong with its options."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from served import HELLO, events_of
from tinychat import Command, make_model, save

RUN = "from specdec.cli.main import main; main()"


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its address once it serves."""
    ran = subprocess.Popen([sys.executable, "-c", RUN, "serve", *arguments], stderr=subprocess.PIPE, text=True)
    assert ran.stderr is not None
    try:
        said = []
        for line in ran.stderr:
            said.append(line)
            if found := re.search(r" at (http://\S+)$", line):
                yield ran, found[1]
                return
        pytest.fail("".join(said))
    finally:
        if ran.poll() is None:
            ran.kill()
        ran.wait()
        ran.stderr.close()


def open_stream(url: str, **fields: Any) -> Any:
    body = json.dumps({"messages": HELLO, "stream": True, "temperature": 0, **fields}).encode()
    return urlopen(Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"}), timeout=60)


@pytest.mark.slow
def test_sigterm_lets_streams_finish_and_ends_those_that_take_too_long(tmp_path: Path) -> None:
    """One answer is short and one longer than the grace; both end cleanly, and the process with status 0."""
    model = save(tmp_path / "tiny", make_model(eos=None, max_position_embeddings=8192))
    options = ("--port", "0", "--grace", "6", "--drafter", "none", "--no-accelerate", "--name", "tiny")
    with process(model, *options) as (ran, url):
        with open_stream(url, max_tokens=8000) as long, open_stream(url, max_tokens=200) as short:
            for stream in (long, short):  # both have their first tokens: they run, and were not only accepted
                for _ in range(3):
                    stream.readline()
            ran.send_signal(signal.SIGTERM)
            texts: dict[str, str] = {}
            readers = [
                threading.Thread(target=lambda name=name, each=each: texts.update({name: each.read().decode()}))
                for name, each in (("long", long), ("short", short))
            ]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join(60)
        assert ran.wait(60) == 0
    *_, ending, done = events_of(texts["short"].lstrip())
    assert (ending["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    *_, last = events_of(texts["long"].lstrip())
    assert last["error"]["code"] == "shutting_down"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grace", "-1"], "grace_s must be at least 0"),
        (["--timeout", "0"], "request_timeout_s must be at least"),
        (["--api-key", ""], "api_key is empty"),
        (["--drafter", "nonesuch"], "nonesuch"),
        (["--verifier", "nonesuch"], "nonesuch"),
        (["--max-nodes", "-1"], "max_nodes"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 8000"),
    ],
)
def test_bad_options_are_found_before_a_model_is_loaded(command: Command, arguments: list[str], words: str) -> None:
    ran = command("serve", "no-such-model", *arguments)
    assert ran.status == 2
    assert words in ran.error


def test_a_port_that_is_taken_is_named(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ran = command("serve", "no-such-model", "--port", port)
    assert f"cannot listen on 127.0.0.1 port {port}" in ran.error


def test_a_missing_package_is_named_with_the_way_to_get_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else found(name, *rest)
    )
    ran = command("serve")
    assert (ran.status, "uvicorn" in ran.error, "specdec-toolkit[serve]" in ran.error) == (2, True, True)


def test_the_command_line_starts_without_the_servers_packages() -> None:
    """They are an extra: the other commands must not need them."""
    code = "import sys, specdec.cli.main; assert not {'fastapi', 'uvicorn', 'starlette', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
