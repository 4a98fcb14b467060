"""What cannot be answered is refused in OpenAI's format, with the field to blame; nothing that matters is ignored."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import HELLO, Answered, Served
from tinychat import make_tokenizer

from specdec.serve.bodies import ChatBody
from specdec.serve.limits import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engine = FakeEngine(make_tokenizer(), context_length=100)
    limits = Limits(max_prompt_tokens=50, max_new_tokens=60, max_body_bytes=20_000, max_choices=4, body_timeout_s=0.5)
    with Served(engine, limits) as server:
        yield server
    engine.close()


def check(answer: Answered, status: int, param: str | None, words: str) -> None:
    assert answer.status == status, answer.text
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], words in error["message"]) == (param, True), error


TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 5}, "n", "may have 4"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 61}, "max_tokens", "at most 60"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "max_completion_tokens"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": [3]}, "stop[0]", "string"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids", "must be in"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"3": 101}}, "logit_bias", "[-100, 100]"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what", "not permitted"),
        ({"speculation": True}, "speculation", "stream: true"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content[0].type", "'text'"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls", "not permitted"),
        ({"messages": [{"role": "user", "content": "x" * 51}]}, "messages", "at most 50"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "tokenize"),
        ({"tools": [TOOL]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"temprature": 0.5}, "temprature", "not a field"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "needs a schema"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "both constrain"),
        ({"structured_outputs": {}}, "structured_outputs", "no constraint"),
    ],
)  # fmt: skip
def test_a_bad_field_is_refused_by_its_name(served: Served, fields: dict[str, Any], param: str, words: str) -> None:
    check(served.chat(**fields), 400, param, words)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None, "tool_choice": "none", "store": False, "service_tier": "auto", "user": "me", "metadata": {"a": "b"}},
        {"n": None, "stop": None, "response_format": {"type": "text"}, "logit_bias": {}, "best_of": 1},
    ],
)  # fmt: skip
def test_fields_that_change_nothing_are_taken(served: Served, fields: dict[str, Any]) -> None:
    assert served.chat(**fields).status == 200


def test_another_model_does_not_exist(served: Served) -> None:
    check(served.chat(model="gpt"), 404, "model", "'tiny'")
    assert served.chat(model=None).status == 200


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "no tokens"), ([], "empty"), ([[]], "no tokens"), ([-1], "outside"), ([10**6], "outside"), ("x" * 51, "at most 50"),
     (["a"] * 5, "may have 4")],
)  # fmt: skip
def test_a_prompt_that_cannot_be_continued_is_refused(served: Served, prompt: Any, words: str) -> None:
    check(served.ask(TEXT, {"prompt": prompt}), 400, "prompt", words)


def test_an_answer_must_fit_behind_its_prompt() -> None:
    engine = FakeEngine(make_tokenizer(), context_length=20)
    with Served(engine) as served:
        answer = served.ask(TEXT, {"prompt": "x" * 12, "max_tokens": 9})
        check(answer, 400, "max_tokens", "room for 8")
        assert answer.error["code"] == "context_length_exceeded"
        check(served.ask(TEXT, {"prompt": "x" * 20}), 400, "prompt", "at most 19")
        assert served.ask(TEXT, {"prompt": "x" * 12}).json["usage"]["completion_tokens"] == 8
    engine.close()


@pytest.mark.parametrize(
    "body",
    [b"{", b"[1,", b"\xff\xfe", b"nope", b"[" * 9000, b'{"messages": ' + b"[" * 9000, b"[]", b"3", b'"x"', b"null",
     b'{"prompt": "x", "seed": ' + b"9" * 6000 + b"}", b'{"prompt": "x", "temperature": NaN}',
     b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "\\ud800"}'],
)  # fmt: skip
def test_malformed_bodies_are_the_senders_fault(served: Served, body: bytes) -> None:
    for path in (CHAT, TEXT):
        answer = served.ask(path, body)
        assert answer.status == 400, answer.text
        assert answer.error["type"] == "invalid_request_error"


def test_what_is_not_json_is_refused(served: Served) -> None:
    """A form of any web page can send text/plain to a server on this machine; JSON it cannot without being asked first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        check(served.ask(CHAT, b'{"messages": []}', {"Content-Type": kind}), 415, None, "application/json")
    check(served.ask(CHAT, b""), 400, None, "empty")


def test_a_huge_body_is_refused_however_it_is_sent(served: Served) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 3_000_000}]}).encode()
    check(served.ask(CHAT, big), 413, None, "larger than 20000 bytes")
    for arguments in (["-H", "Expect:"], ["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"]):
        ran = subprocess.run(
            ["curl", "-s", "-w", "%{http_code}", f"{served.url}{CHAT}", "-H", "Content-Type: application/json",
             *arguments, "--data-binary", "@-"],
            input=big, capture_output=True, check=True,
        )  # fmt: skip
        assert ran.stdout.endswith(b"413"), (arguments, ran.stdout)
    assert served.chat().status == 200


def test_a_body_that_does_not_arrive_is_given_up(served: Served) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        )
        connection.sendall(head.encode() + b'{"mess')
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_unknown_paths_and_methods(served: Served) -> None:
    check(served.ask("/v1/embeddings", {}), 404, None, "no POST /v1/embeddings")
    check(served.ask(CHAT), 405, None, "no GET")


def test_a_model_without_a_chat_template_says_what_to_use() -> None:
    engine = FakeEngine(make_tokenizer(template=None))
    with Served(engine) as served:
        answer = served.chat()
        check(answer, 400, "messages", "/v1/completions")
        assert answer.error["code"] == "no_chat_template"
        assert served.ask(TEXT, {"prompt": "x"}).status == 200
    engine.close()


def test_a_chat_template_that_refuses_is_quoted() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    engine = FakeEngine(make_tokenizer(template=template))
    with Served(engine) as served:
        check(served.chat(), 400, "messages", "roles must alternate")
    engine.close()


# ----- who may ask -----


def test_with_a_key_nothing_but_the_page_and_health_is_open() -> None:
    engine = FakeEngine(make_tokenizer())
    with Served(engine, api_key="sésame") as served:
        for path in (CHAT, "/v1/models", "/metrics", "/openapi.json", "/v1/nope"):
            for given in ("", "Bearer", "Bearer wrong", "Basic sésame", "sésame"):
                headers = {"Authorization": given.encode().decode("latin-1")} if given else {}
                answer = served.ask(path, {} if path == CHAT else None, headers)
                check(answer, 401, None, "API key")
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer sésame".encode().decode("latin-1")}
        assert served.ask("/v1/models", headers=right).status == 200
        assert served.ask("/metrics", headers=right).status == 200
        assert served.ask("/health").status == served.ask("/").status == 200
    engine.close()


def test_a_wrong_key_is_found_before_the_body_is_read() -> None:
    engine = FakeEngine(make_tokenizer())
    with Served(engine, Limits(max_body_bytes=10), api_key="k") as served:
        assert served.chat().status == 401
    engine.close()


def test_a_server_on_loopback_answers_to_loopback_names_only(served: Served) -> None:
    """A page elsewhere may let its own name point to 127.0.0.1 and ask from the visitor's browser."""
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", ""):
        check(served.ask("/v1/models", headers={"Host": host}), 403, None, "--allowed-host")
    for host in ("localhost", f"localhost:{served.port}", "127.0.0.1", "[::1]", f"[::1]:{served.port}"):
        assert served.ask("/v1/models", headers={"Host": host}).status == 200
    engine = FakeEngine(make_tokenizer())
    with Served(engine, hosts=["llm.example"]) as named:
        assert named.ask("/v1/models", headers={"Host": "llm.example"}).status == 200
    with Served(engine, is_loopback=False) as outside:
        assert outside.ask("/v1/models", headers={"Host": "llm.example"}).status == 200
    engine.close()


def test_other_web_sites_may_not_ask_unless_they_are_named(served: Served) -> None:
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    refused = served.ask(CHAT, headers=asking, method="OPTIONS")
    assert refused.status == 405
    assert "access-control-allow-origin" not in refused.headers
    assert "access-control-allow-origin" not in served.ask("/v1/models", headers=asking).headers
    engine = FakeEngine(make_tokenizer())
    with Served(engine, origins=["https://a.example"], api_key="k") as named:
        answer = named.ask(CHAT, headers=asking, method="OPTIONS")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
        other = named.ask(CHAT, headers={**asking, "Origin": "https://b.example"}, method="OPTIONS")
        assert "access-control-allow-origin" not in other.headers
    engine.close()


def test_constraints_need_their_package(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "specdec.grammar.inputs", None)
    check(served.chat(response_format={"type": "json_object"}), 400, "response_format", "specdec-toolkit[grammar]")


@pytest.mark.parametrize("schema", ['"/etc/passwd"', '"schema.json"', "[]", "3", "{", "[" * 5000])
def test_a_schema_is_never_taken_for_the_name_of_a_file(served: Served, schema: str) -> None:
    """The library reads a schema from a file if it is given a name, and a client's text must not be one."""
    pytest.importorskip("specdec.grammar.inputs")
    check(served.chat(guided_json=schema), 400, "guided_json", "JSON")


FIELDS = [*ChatBody.model_fields, "tools", "echo", "x"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3), st.sampled_from([CHAT, TEXT]))
def test_no_body_makes_the_server_fail(served: Served, fields: dict[str, Any], path: str) -> None:
    """Whatever is sent, the answer is an answer, a stream, or an error that blames the sender."""
    answer = served.ask(path, {"messages": HELLO, "prompt": "x", "max_tokens": 2, **fields})
    assert answer.status in (200, 400, 404), (fields, answer.text)
    if answer.status != 200:
        assert answer.error["type"] in ("invalid_request_error", "not_found_error")
