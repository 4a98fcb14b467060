"""Traces: what was written can be read again, however the run ended."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from specdec.interfaces import Step
from specdec.records.trace import TraceWriter, read_trace

STEP = Step(
    row=3,
    index=0,
    position=10,
    tokens=(5, 6),
    nodes=(0, 2),
    tree_tokens=(4, 9, 5),
    tree_parents=(-1, 0, 0),
    num_rows=2,
    draft_s=0.1,
    score_s=0.2,
    verify_s=0.3,
    finished=True,
)


def write(path, *, end=True):
    with TraceWriter(path, {"command": "x"}) as trace:
        trace.step(STEP, method="ngram", question_id="q", category="chat", turn=0)
        trace.output([5, 6], wall_s=1.5, prefill_s=0.5, method="ngram", question_id="q", category="chat", turn=0)
        if end:
            trace.end()


def test_a_trace_reads_back_as_it_was_written(tmp_path):
    write(tmp_path / "t.jsonl")
    head, step, output, end = read_trace(tmp_path / "t.jsonl")
    assert head == {"schema": 1, "type": "provenance", "command": "x"}
    assert step == {
        "type": "step",
        "method": "ngram",
        "question_id": "q",
        "category": "chat",
        "turn": 0,
        "row": 3,
        "index": 0,
        "position": 10,
        "tokens": [5, 6],
        "nodes": [0, 2],
        "tree_tokens": [4, 9, 5],
        "tree_parents": [-1, 0, 0],
        "num_drafted": 2,
        "num_accepted": 1,
        "num_rows": 2,
        "draft_s": 0.1,
        "score_s": 0.2,
        "verify_s": 0.3,
        "finished": True,
    }
    assert (output["num_tokens"], output["token_ids"], output["wall_s"], output["prefill_s"]) == (2, [5, 6], 1.5, 0.5)
    assert end == {"type": "end", "num_steps": 1, "num_outputs": 1}


def test_every_field_of_a_step_is_in_the_trace(tmp_path):
    """A field added to Step must not be forgotten here: analysis has nothing else."""
    write(tmp_path / "t.jsonl")
    assert set(Step.__dataclass_fields__) <= set(list(read_trace(tmp_path / "t.jsonl"))[1])


def test_lines_are_there_before_the_file_is_closed(tmp_path):
    """A crash must lose nothing that was measured."""
    trace = TraceWriter(tmp_path / "t.jsonl", {})
    trace.step(STEP)
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 2
    trace.close()


def test_a_missing_end_is_told(tmp_path):
    write(tmp_path / "t.jsonl", end=False)
    *_, last = read_trace(tmp_path / "t.jsonl")
    assert (last["type"], last["line"]) == ("warning", 3)
    assert "no end line" in last["message"]


def test_a_last_line_cut_short_is_left_out_and_told(tmp_path):
    path = tmp_path / "t.jsonl"
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:17])
    kinds = [line["type"] for line in read_trace(path)]
    assert kinds == ["provenance", "step", "warning"]
    assert list(read_trace(path))[-1]["line"] == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "line 1: the file is empty"),
        ("a,b,c\n1,2,3\n", "line 1: not JSON"),
        ("half of a line", "line 1: not JSON"),
        ('{"type": "step"}\n', "line 1: a trace of specdec begins with its provenance"),
        ('{"schema": 99, "type": "provenance"}\n', "schema 99 is newer"),
        ('{"schema": 1, "type": "provenance"}\n{"type": "step"}\n[1]\n{"type": "end"}\n', "line 3: not a JSON object"),
        ('{"schema": 1, "type": "provenance"}\nnonsense\n{"type": "end"}\n', "line 2: not JSON"),
    ],
)
def test_another_kind_of_file_is_refused_by_its_line(tmp_path, content, complaint):
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint) as error:
        list(read_trace(path))
    assert str(path) in str(error.value)


def test_types_of_a_later_version_are_passed_on(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        "".join(json.dumps(d) + "\n" for d in ({"schema": 1, "type": "provenance"}, {"type": "new"}, {"type": "end"}))
    )
    assert [line["type"] for line in read_trace(path)] == ["provenance", "new", "end"]


def test_reading_needs_no_torch():
    """Analysis runs on machines without a model."""
    code = "import sys, specdec.records.trace; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
