"""Workloads: the same spec gives the same requests, files are checked line by line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tinychat import make_tokenizer

from specdec.records.workloads import Defaults, build_workload, conversation, parse_workload, render, waves

DEFAULTS = Defaults(max_new_tokens=32, temperature=0.0, seed=7)
TOKENIZER = make_tokenizer()


def build(text: str):
    return build_workload(parse_workload(text), DEFAULTS, TOKENIZER)


def test_ragged_prompts_differ_in_length_and_never_repeat() -> None:
    requests = build("ragged:n=200")
    lengths = [len(request.messages[0]["content"]) for request in requests]
    assert max(lengths) > 20 * min(lengths)
    assert len({request.messages[0]["content"] for request in requests}) == 200
    assert {request.max_new_tokens for request in requests} <= set(range(8, 33))
    assert [request.seed for request in requests] == list(range(7, 207))
    assert requests == build("ragged:n=200")
    assert requests != build("ragged:n=200,seed=1")


def test_a_shared_prefix_is_as_long_as_asked() -> None:
    requests = build("prefix:n=4,tokens=300")
    texts = [request.messages[0]["content"] for request in requests]
    shared = next(i for i, signs in enumerate(zip(*texts, strict=False)) if len(set(signs)) > 1)
    assert 250 <= shared <= 310
    assert len(set(texts)) == 4


def test_the_second_turn_holds_the_first_answer() -> None:
    requests = build("chat:n=3")
    by_id = {request.request_id: request for request in requests}
    first, second = waves(requests)
    assert [request.follows for request in second] == [request.request_id for request in first]
    messages = conversation(second[0], by_id, {first[0].request_id: "the answer"})
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert "the answer" in TOKENIZER.decode(render(TOKENIZER, messages))


def test_samples_are_one_prompt_with_many_seeds() -> None:
    requests = build("samples:n=5")
    assert len({request.messages[0]["content"] for request in requests}) == 1
    assert len({request.seed for request in requests}) == 5
    assert all(request.temperature > 0 for request in requests)


def test_arrivals_come_at_their_rate() -> None:
    """Poisson: the mean of 400 gaps is within five standard errors of 1/4 s (a fixed seed)."""
    requests = build("poisson:4,n=400,seed=3")
    times = [request.arrival_s for request in requests]
    assert times == sorted(times)
    assert times[-1] / 400 == pytest.approx(0.25, rel=5 / 20)
    assert build("prefix:n=2,rate=4")[1].arrival_s > 0
    assert all(request.arrival_s == 0 for request in build("ragged:n=5"))


def test_a_file_says_what_it_wants(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(
        '{"prompt": "late", "arrival_s": 2, "max_new_tokens": 3, "temperature": 0.5, "seed": 9}\n\n'
        '{"messages": [{"role": "user", "content": "soon"}], "request_id": "a"}\n'
    )
    soon, late = build(str(path))
    assert (soon.request_id, soon.max_new_tokens, soon.seed, soon.temperature) == ("a", 32, 9, 0.0)
    assert (late.request_id, late.max_new_tokens, late.seed, late.temperature) == ("line-1", 3, 9, 0.5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("poisson", "needs a rate"),
        ("poisson:0", "positive"),
        ("ragged:n=0", "1 or more"),
        ("ragged:x=1", "no option 'x'"),
        ("ragged:n=many", "numbers"),
    ],
)
def test_specs_are_checked(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_workload(text)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 1"),
        ("[]", "either"),
        ('{"prompt": "a", "messages": []}', "either"),
        ('{"prompt": 3}', "text"),
        ('{"prompt": " "}', "blank"),
        ('{"messages": []}', "blank"),
        ('{"messages": ["a"]}', "role"),
        ('{"prompt": "a", "top_p": 1}', "unknown key 'top_p'"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens"),
        ('{"prompt": "a", "temperature": -1}', "temperature"),
        ('{"prompt": "a", "arrival_s": NaN}', "arrival_s"),
        ('{"prompt": "a", "request_id": "x"}\n{"prompt": "b", "request_id": "x"}', "same request_id"),
        ("", "no requests"),
    ],
)
def test_lines_are_checked(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=complaint):
        build(str(path))


def test_a_missing_file_says_what_a_workload_is() -> None:
    with pytest.raises(ValueError, match=r"ragged\|prefix"):
        build("nosuch")
