"""Loading traces: both lanes agree with plain JSON, and files that are cut short, damaged or foreign are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.analysis.columns import Label, Steps
from specdec.analysis.jsonl import Columns, Heads, fast_columns
from specdec.analysis.load import load
from specdec.interfaces import Step
from specdec.records.trace import TraceWriter

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "notebooks" / "data" / "bench.jsonl"
LABEL = Label(0, "ngram", "ngram", "match", "1", "chat", 0)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(path) if line["type"] == "step"]


def without_probabilities(path: Path, to: Path) -> Path:
    """The same trace as a run without --trace-probs writes it."""
    optional = {"node_probs", "draft_probs", "estimates", "token_probs", "entropies"}
    kept = [{k: v for k, v in line.items() if k not in optional} for line in lines_of(path)]
    to.write_text("".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in kept))
    return to


def fast(*lines: str | bytes) -> Columns | None:
    """What the fast lane makes of step lines."""
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    return fast_columns(raw, Heads(lambda _: LABEL))[0]


def assert_equal(steps: Steps, expected: list[dict[str, Any]]) -> None:
    """Every column against the lines, one step after another."""
    assert len(steps) == len(expected)
    for name in ("row", "index", "position", "num_rows", "draft_s", "score_s", "verify_s", "finished"):
        assert getattr(steps, name).tolist() == [line[name] for line in expected]
    for name, offsets in (("nodes", steps.kept_offsets), ("tokens", steps.kept_offsets),
                          ("tree_tokens", steps.tree_offsets), ("tree_parents", steps.tree_offsets)):  # fmt: skip
        column = getattr(steps, name)
        pieces = [column[a:b].tolist() for a, b in pairwise(offsets)]
        assert pieces == [line[name] for line in expected]
    assert steps.num_accepted.tolist() == [line["num_accepted"] for line in expected]
    assert steps.num_drafted.tolist() == [line["num_drafted"] for line in expected]


def test_the_columns_are_those_of_a_real_trace() -> None:
    trace = load(REAL)
    assert_equal(trace.steps, steps_of(REAL))
    first = next(line for line in steps_of(REAL) if line.get("estimates"))
    assert trace.steps.estimates is not None
    assert trace.names == ["hf-generate", "hf-prompt-lookup", "plain", "ngram", "recycling", "hybrid"]
    i = steps_of(REAL).index(first)
    begin, end = trace.steps.tree_offsets[i : i + 2]
    assert trace.steps.estimates[begin:end].tolist() == first["estimates"]


@pytest.mark.parametrize("has_probabilities", [True, False])
def test_the_fast_lane_reads_the_same(tmp_path: Path, has_probabilities: bool) -> None:
    """Numbers cut out of bytes must be those that JSON reads, to the last bit."""
    path = REAL if has_probabilities else without_probabilities(REAL, tmp_path / "plain.jsonl")
    raw = [line for line in path.read_bytes().splitlines(keepends=True) if line.startswith(b'{"type":"step"')]
    assert fast(*raw) is not None, "the fast lane refuses what TraceWriter writes"
    trace = load(path)
    assert_equal(trace.steps, steps_of(path))
    assert (trace.steps.estimates is not None) == has_probabilities


def step_line(**changes: Any) -> dict[str, Any]:
    line = {
        "type": "step", "method": "ngram", "drafter": "ngram", "verifier": "match", "question_id": "1",
        "category": "chat", "turn": 0, "row": 0, "index": 0, "position": 7, "tokens": [5, 6], "nodes": [0, 2],
        "tree_tokens": [4, 9, 5], "tree_parents": [-1, 0, 0], "num_drafted": 2, "num_accepted": 1, "num_rows": 1,
        "draft_s": 1e-05, "score_s": 0.25, "verify_s": 0.5, "finished": True,
    }  # fmt: skip
    return line | changes


HEAD = {"schema": 1, "type": "provenance", "settings": {"num_prompts": 3}}
END = {"type": "end", "num_steps": 1, "num_outputs": 0}


def write(path: Path, *lines: dict[str, Any], **how: Any) -> Path:
    form = {"separators": (",", ":")} | how
    path.write_text("".join(json.dumps(line, **form) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "lines",
    [
        [step_line(), step_line(index=1, draft_s=2.5e-17, finished=False)],
        [step_line(category='"row":5,[x]\\', question_id="]")],
        [step_line(num_rows=1, nodes=[0, 1], extra="a field of a later version")],
        [dict(reversed(step_line().items()))],
        [step_line(draft_s=0, score_s=10**16)],
        [step_line(), step_line() | {"node_probs": [1, 0.5, 0.25]}],
    ],
    ids=["plain", "odd words", "extra field", "other order", "other numbers", "mixed"],
)
def test_however_a_step_is_written_it_reads_the_same(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    for how in ({}, {"separators": (", ", ": ")}):
        trace = load(write(tmp_path / "t.jsonl", HEAD, *lines, END, **how))
        assert_equal(trace.steps, lines)
        assert trace.labels[0].category == lines[0]["category"]


def test_keys_in_another_order_are_not_taken_for_each_other() -> None:
    """The fast lane goes by place: lines that only look alike must not pass."""
    line = json.dumps(step_line(), separators=(",", ":")) + "\n"
    swapped = line.replace('"draft_s"', '"x"').replace('"score_s"', '"draft_s"').replace('"x"', '"score_s"')
    longer = line.replace('"tokens":[5,6]', '"tokens":[5,6,7]')
    assert fast(line) is not None
    assert fast(swapped) is None
    assert fast(longer) is None


def test_what_the_writer_writes_is_read(tmp_path: Path) -> None:
    """A field that TraceWriter gains in the middle would silently send everything through the slow lane."""
    with TraceWriter(tmp_path / "t.jsonl", {}) as trace:
        trace.step(
            Step(3, 0, 10, (5, 6), (0, 2), (4, 9, 5), (-1, 0, 0), 2, 0.1, 0.2, 0.3, True),
            method="ngram", drafter=None, verifier="match", question_id="q", category="chat", turn=0,
        )  # fmt: skip
        trace.end()
    _, step, _ = (tmp_path / "t.jsonl").read_bytes().splitlines(keepends=True)
    assert fast(step) is not None


def test_several_files_are_one_trace(tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", HEAD, step_line(category="code"), END)
    one = write(tmp_path / "a.jsonl", HEAD, step_line(), step_line() | {"entropies": [1.0, 2.0]}, END)
    trace = load(one, other)
    assert (len(trace.runs), len(trace.steps)) == (2, 3)
    assert trace.categories == ["chat", "code"]
    assert trace.steps.entropies is not None
    assert np.isnan(trace.steps.entropies).tolist() == [True, True, False, False, True, True]


def test_a_run_cut_short_is_taken_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write(path, HEAD, step_line(), step_line(index=1))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.warns(UserWarning, match=r"cut short|no end line") as told:
        trace = load(path)
    assert len(trace.steps) == 1
    cut, missing = (str(each.message) for each in told)
    assert "the last line is cut short" in cut
    assert "it holds 0 of 3 questions" in missing
    assert trace.warnings == [cut, missing]


def test_every_prefix_of_a_trace_is_read_or_refused_in_words(tmp_path: Path) -> None:
    """A disk that is full ends a file anywhere."""
    whole = REAL.read_bytes()[:60_000]
    path = tmp_path / "t.jsonl"
    counts = []
    for length in range(10_000, len(whole), 3_001):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            counts.append(len(load(path).steps))
    assert counts == sorted(counts)
    assert counts[-1] > 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1: the file is empty"),
        ("a,b\n1,2\n", "line 1: not JSON"),
        ('{"type":"step"}\n', "line 1: a trace of specdec begins with its provenance"),
        ('{"schema":99,"type":"provenance"}\n', "schema 99 is newer"),
        (json.dumps(HEAD) + "\nnonsense\n{}\n", "line 2: not JSON"),
        (json.dumps(HEAD) + '\n{"type":"output","method":"x"}\n', "line 2: a damaged output"),
        (json.dumps(HEAD) + "\n" + json.dumps(step_line(nodes=[0])) + "\n", "line 2: a damaged step"),
        (
            "\n".join(map(json.dumps, (HEAD, step_line(), {"type": "step"}))) + "\n",
            "line 3: a damaged step .no field 'nodes'",
        ),
    ],
)
def test_another_kind_of_file_is_refused_by_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        load(path)
    assert str(path) in str(error.value)


def test_no_file_and_a_missing_one() -> None:
    with pytest.raises(ValueError, match="at least one trace"):
        load()
    with pytest.raises(FileNotFoundError):
        load("nonesuch.jsonl")


def test_types_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    assert len(load(write(tmp_path / "t.jsonl", HEAD, {"type": "moon"}, step_line(), END)).steps) == 1


def test_a_selection_keeps_what_belongs_together() -> None:
    trace = load(REAL)
    part = trace.select("ngram", categories=["code", "chat"])
    expected = [s for s in steps_of(REAL) if s["drafter"] == "ngram" and s["category"] in ("code", "chat")]
    assert_equal(part.steps, expected)
    assert part.names == ["ngram"]
    assert sorted(part.categories) == ["chat", "code"]
    with pytest.raises(ValueError, match="no method 'nonesuch'; it has hf-generate"):
        trace.select("nonesuch")


def test_reading_needs_neither_torch_nor_a_model() -> None:
    code = (
        "import sys; from specdec.analysis import acceptance, compare, load, results, speedup;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_table_for_pandas_holds_every_step() -> None:
    table = load(REAL).table()
    expected = steps_of(REAL)
    assert {len(column) for column in table.values()} == {len(expected)}
    assert table["question_id"].tolist() == [line["question_id"] for line in expected]
    assert table["name"].tolist() == [line["drafter"] or line["method"] for line in expected]
    assert table["num_emitted"].tolist() == [len(line["tokens"]) for line in expected]
