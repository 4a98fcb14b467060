"""The two lanes through a trace: whatever is in a file, the fast one changes nothing but the time it takes."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec.analysis.columns import KEPT, Label, Trace
from specdec.analysis.jsonl import OPTIONAL, Columns, Heads, fast_columns
from specdec.analysis.load import load
from specdec.interfaces import Step
from specdec.records.trace import TraceWriter

CacheRow = tuple[Step, dict[str, Any], dict[str, Any]]  # a step, its optional fields, its labels

# Each example writes its files anew, so it does not matter that they share a folder.
examples = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

COUNTS = st.integers(0, 10**6)
SECONDS = st.one_of(st.floats(0, 10, allow_subnormal=True), st.sampled_from([0.0, -0.0, 1e-05, 5e-324, 1e22]))
NUMBERS = st.one_of(
    st.none(), st.floats(0, 1), st.sampled_from([0, 1, -0.0, 1.2e-17, 1e300, math.nan, math.inf, -math.inf])
)
LABELS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["plain", "ngram"]),
        "drafter": st.none() | st.just("ngram:max_order=2"),
        "verifier": st.none() | st.just("match"),
        "question_id": st.text(max_size=3) | st.sampled_from(['"row":5,[x]\\', "]", ',"row":']),
        "category": st.sampled_from(["chat", "préfixe"]),
        "turn": st.integers(0, 2),
    }
)


@st.composite
def lines(draw: st.DrawFn) -> CacheRow:
    num_nodes, num_kept = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    step = Step(
        row=draw(COUNTS),
        index=draw(COUNTS),
        position=draw(COUNTS),
        tokens=draw(ints(num_kept)),
        nodes=draw(ints(num_kept)),
        tree_tokens=draw(ints(num_nodes)),
        tree_parents=(-1, *draw(ints(num_nodes - 1))),
        num_rows=draw(COUNTS),
        draft_s=draw(SECONDS),
        score_s=draw(SECONDS),
        verify_s=draw(SECONDS),
        finished=draw(st.booleans()),
    )
    known = draw(st.sets(st.sampled_from(OPTIONAL)) | st.just(set(OPTIONAL)))
    details = {
        name: draw(numbers(len(step.nodes if name in KEPT else step.tree_tokens))) for name in OPTIONAL if name in known
    }
    return step, details, draw(LABELS)


def ints(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[COUNTS] * length)


def numbers(length: int) -> st.SearchStrategy[list[float | None]]:
    return st.just([]) | st.lists(NUMBERS, min_size=length, max_size=length)


def write(path: Path, steps: Sequence[CacheRow]) -> list[bytes]:
    """The lines that TraceWriter makes of these steps."""
    with TraceWriter(path, {"settings": {"num_prompts": 0}}) as trace:
        for step, details, labels in steps:
            trace.step(step, details, **labels)
        trace.end()
    return path.read_bytes().splitlines(keepends=True)


def fast(raw: Sequence[bytes]) -> Columns | None:
    return fast_columns(raw, Heads(lambda _: Label(0, "ngram", None, "match", "q", "chat", 0)))[0]


def outcome(path: Path) -> Trace | str:
    """What loading gives, or what it complains of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return load(path)
    except ValueError as error:
        return str(error)


def slow_outcome(path: Path) -> Trace | str:
    with patch("specdec.analysis.load.fast_columns", lambda lines, _: (None, range(len(lines)))):
        return outcome(path)


def bits(column: Any) -> Any:
    """Minus zero differs from zero; NaN is NaN, whatever its sign."""
    if column is None or column.dtype != np.float64:
        return column
    return np.where(np.isnan(column), np.nan, column).view(np.int64)


def assert_same(one: Trace | str, other: Trace | str) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert one.labels == other.labels
    assert one.runs == other.runs
    for each in fields(one.steps):
        a, b = (getattr(trace.steps, each.name) for trace in (one, other))
        assert np.array_equal(bits(a), bits(b)), each.name
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None), each.name


@examples
@given(st.lists(lines(), min_size=1, max_size=6))
def test_what_the_writer_writes_goes_the_fast_lane_and_reads_the_same(tmp_path: Path, steps: list[CacheRow]) -> None:
    _, *raw, _ = write(tmp_path / "t.jsonl", steps)
    assert fast(raw) is not None
    assert_same(outcome(tmp_path / "t.jsonl"), slow_outcome(tmp_path / "t.jsonl"))


@examples
@given(st.lists(lines(), min_size=1, max_size=6))
def test_columns_are_what_was_written(tmp_path: Path, steps: list[CacheRow]) -> None:
    """The lanes share their last step, so that they agree is not all."""
    write(tmp_path / "t.jsonl", steps)
    columns = load(tmp_path / "t.jsonl").steps
    assert columns.draft_s.tolist() == [step.draft_s for step, _, _ in steps]
    assert columns.tree_parents.tolist() == [parent for step, _, _ in steps for parent in step.tree_parents]
    for name in OPTIONAL:
        column = getattr(columns, name)
        values = []
        for step, details, _ in steps:
            length = len(step.nodes if name in KEPT else step.tree_tokens)
            values += details.get(name) or [None] * length
        if not any(details.get(name) for _, details, _ in steps):
            assert column is None
            continue
        expected = np.array([math.nan if value is None else value for value in values], np.float64)
        assert np.array_equal(bits(column), bits(expected))


@examples
@given(st.lists(lines(), min_size=1, max_size=4), st.data())
def test_a_changed_byte_is_never_taken_for_something_else(
    tmp_path: Path, steps: list[CacheRow], data: st.DataObject
) -> None:
    """Either lane refuses the file by the same line, or both read the same: what is not JSON is no number."""
    path = tmp_path / "t.jsonl"
    head, *raw = write(path, steps)
    body = b"".join(raw)
    at = data.draw(st.integers(0, len(body) - 1))
    old, new = data.draw(st.sampled_from([(1, 0), (1, 1), (0, 1)]))
    byte = data.draw(st.sampled_from(b'0159.,-+eE":[]{} \n\0\xffrnf'))
    path.write_bytes(head + body[:at] + bytes([byte] * new) + body[at + old :])
    assert_same(outcome(path), slow_outcome(path))


STEP = Step(3, 0, 10, (5, 6), (0, 2), (4, 9, 5), (-1, 0, 0), 2, 0.1, 0.25, 0.3, True)
DETAILS = {
    "node_probs": [1.0, 0.5, 1e-05],
    "draft_probs": [None, 0.5, None],
    "estimates": [],
    "token_probs": [0.5, 0.75],
    "entropies": [1.5, 2.5],
}
LABEL = {
    "method": "ngram", "drafter": None, "verifier": "match", "question_id": "q", "category": "chat", "turn": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"node_probs":[1.0,0.5,1e-05]', '"node_probs":[1.0,0.5]', "node_probs must have 3 numbers, got 2"),
        ('"estimates":[]', '"estimates":[1.0]', "estimates must have 3 numbers, got 1"),
        ("[null,0.5,null]", "[null,true,{}]", "draft_probs must be numbers"),
        ("[null,0.5,null]", "[null,0.5,[1]]", "draft_probs must be numbers"),
        ("[1.5,2.5]", "[1.5,02.5]", "not JSON"),
        ("[1.5,2.5]", "[1.5,.5]", "not JSON"),
        ("[1.5,2.5]", "[1.5,nan]", "not JSON"),
        ("[1.5,2.5]", "[1.5 2.5]", "not JSON"),
        ("[1.5,2.5]", "[1.5,,2.5]", "not JSON"),
        ("[1.5,2.5]", "]1.5,2.5[", "not JSON"),
        ("[1.5,2.5]", "[1.5,1" + "0" * 400 + "]", "entropies must be numbers"),
        ('"tokens":[5,6]', '"tokens":[5,6,7]', "tokens, nodes and num_accepted do not fit each other"),
        ('"tokens":[5,6]', '"tokens":[5,null]', "tokens must be whole numbers, got .5, None"),
        ('"tokens":[5,6]', '"tokens":[5,6.5]', "tokens must be whole numbers"),
        ('"tokens":[5,6]', '"tokens":[5,1e5]', "tokens must be whole numbers"),
        ('"tokens":[5,6]', '"tokens":[5,10000000000000000000]', "tokens must be whole numbers"),
        ('"num_accepted":1', '"num_accepted":1000000000000000', "tokens, nodes and num_accepted do not fit each other"),
        ('"num_drafted":2', '"num_drafted":-1', "tree_tokens, tree_parents and num_drafted do not fit each other"),
        ('"row":3', '"row":null', "row must be whole numbers, got .None"),
        ('"row":3', '"row":,3', "not JSON"),
        ('"row":3,"index":0', '"row":,"index":3,0', "not JSON"),
        ('"draft_s":0.1', '"draft_s":"0.1"', "draft_s must be numbers, got .'0.1'"),
        ('"draft_s":0.1', '"draft_s":null', "draft_s must be numbers, got .None"),
        ('"finished":true', '"finished":1', "finished must be true or false, got .1"),
        ('"finished":true', '"finished":tru', "not JSON"),
        ('"index":0', '"indx":0', "no field 'index'"),
        ('"turn":0', '"turn":"first"', "invalid literal"),
        ("}\n", "\n", "not JSON"),
    ],
)
def test_a_damaged_line_among_good_ones_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "t.jsonl"
    _, *raw, _ = write(path, [(STEP, DETAILS, LABEL)] * 9)
    damaged = raw[5].decode().replace(old, new)
    assert damaged.encode() != raw[5]
    raw[5] = damaged.encode()
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + b"".join(raw))
    with pytest.raises(ValueError, match=rf"line 7: .*{complaint}"):
        load(path)


def test_damage_that_cancels_out_is_seen(tmp_path: Path) -> None:
    """What one line has too many another one lacks: the chunk as a whole would fit."""
    _, *raw, _ = write(tmp_path / "t.jsonl", [(STEP, DETAILS, LABEL)] * 3)
    longer, shorter = raw[0].replace(b"[5,6]", b"[5,6,7]"), raw[2].replace(b"[5,6]", b"[5]")
    assert fast([longer, raw[1], shorter]) is None
    longer, shorter = raw[0].replace(b"[1.5,2.5]", b"[1.5,2.5,3.5]"), raw[2].replace(b"[1.5,2.5]", b"[1.5]")
    assert fast([longer, raw[1], shorter]) is None


@pytest.mark.parametrize(
    "foreign",
    [
        lambda line: json.dumps(json.loads(line)),
        lambda line: json.dumps(json.loads(line) | {"later": [1]}, separators=(",", ":")),
        lambda line: json.dumps(dict(reversed(json.loads(line).items())), separators=(",", ":")),
        lambda line: json.dumps(json.loads(line) | {"estimates": None}, separators=(",", ":")),
    ],
    ids=["spaces", "a field of a later version", "another order", "null for none"],
)
def test_lines_of_another_layout_stay_where_they_are(tmp_path: Path, foreign: Callable[[bytes], str]) -> None:
    path = tmp_path / "t.jsonl"
    steps = [Step(i, 0, 10, (5, 6), (0, 2), (4, 9, 5), (-1, 0, 0), 2, 0.1, 0.25, 0.3, False) for i in range(5)]
    head, *raw = write(path, [(step, DETAILS if i % 2 else {}, LABEL) for i, step in enumerate(steps)])
    raw[2] = foreign(raw[2]).encode() + b"\n"
    path.write_bytes(head + b"".join(raw))
    assert load(path).steps.row.tolist() == list(range(5))
    assert_same(outcome(path), slow_outcome(path))
