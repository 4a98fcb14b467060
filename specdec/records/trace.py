"""Traces: what every step of a run did, as JSON lines. The schema is documented in docs/traces.md and stable.

A trace begins with a provenance line and ends with an end line; a file without the latter is of a run that was cut
short. Reading needs neither torch nor a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.interfaces import Step

SCHEMA = 1


class TraceWriter:
    """Writes a trace line by line; each line is flushed, so that a crash loses nothing before it.

    A context manager; leaving it closes the file but does not write the end line: ``end`` says that the run is
    complete.
    """

    def __init__(self, path: str | Path, provenance: Mapping[str, Any]) -> None:
        self._file: IO[str] = Path(path).expanduser().open("w", encoding="utf-8")
        self._counts = {"steps": 0, "outputs": 0}
        self._write({"schema": SCHEMA, "type": "provenance", **provenance})

    def step(self, step: Step, details: Mapping[str, Any] | None = None, **labels: Any) -> None:
        """One row's share of one pass. Labels: method, drafter, question_id, category, turn. ``details``, if known,
        are the step's optional fields.
        """
        self._counts["steps"] += 1
        self._write(
            {
                "type": "step",
                **labels,
                "row": step.row,
                "index": step.index,
                "position": step.position,
                "tokens": step.tokens,
                "nodes": step.nodes,
                "tree_tokens": step.tree_tokens,
                "tree_parents": step.tree_parents,
                "num_drafted": step.num_drafted,
                "num_accepted": step.num_accepted,
                "num_rows": step.num_rows,
                "draft_s": step.draft_s,
                "score_s": step.score_s,
                "verify_s": step.verify_s,
                "finished": step.finished,
                **(details or {}),
            }
        )

    def output(self, token_ids: Sequence[int], *, wall_s: float, prefill_s: float, **labels: Any) -> None:
        """What one method emitted for one turn. Labels as for a step, and group, num_rows, num_prompt_tokens."""
        self._counts["outputs"] += 1
        self._write(
            {
                "type": "output",
                **labels,
                "num_tokens": len(token_ids),
                "wall_s": wall_s,
                "prefill_s": prefill_s,
                "token_ids": list(token_ids),
            }
        )

    def prompt(self, token_ids: Sequence[int], **labels: Any) -> None:
        """What all methods were given for one turn. Labels: question_id, category, turn."""
        self._write({"type": "prompt", **labels, "token_ids": list(token_ids)})

    def engine_pass(self, record: Mapping[str, Any], *, time_s: float, **labels: Any) -> None:
        """One pass of an engine that serves many requests. Labels: method, drafter, verifier."""
        self._write({"type": "pass", **labels, "time_s": time_s, **record})

    def vocabulary(self, texts: Mapping[int, str]) -> None:
        """The texts of tokens, so that a reader needs no tokenizer; a trace may hold several of these lines."""
        self._write({"type": "vocabulary", "texts": {str(token): text for token, text in texts.items()}})

    def end(self) -> None:
        """The run is complete."""
        self._write({"type": "end", "num_steps": self._counts["steps"], "num_outputs": self._counts["outputs"]})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        self._file.flush()


def read_trace(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a trace as dicts, one after another; the first is the provenance.

    What a cut-short run leaves behind is told as a last dict ``{"type": "warning", "line": N, "message": ...}``: a
    last line that is not whole (it is dropped), or a missing end line. Types that this version does not know are
    passed on.

    Raises:
        ValueError: not a trace, or one of a newer schema; the message names the line.
        OSError: the file cannot be read.
    """
    name = str(path)
    number, has_ended = 0, False
    with Path(path).expanduser().open("rb") as file:
        for number, raw in enumerate(file, 1):
            is_whole = raw.endswith(b"\n")
            try:
                line = parse_line(raw)
            except ValueError as error:
                if is_whole or number == 1:
                    raise ValueError(f"{name}, line {number}: {error}; it is not a trace of specdec") from None
                yield _warning(number, "the last line is cut short and was left out: the run was interrupted")
                return
            if number == 1:
                check_head(name, line)
            has_ended = line["type"] == "end"
            yield line
    if number == 0:
        raise ValueError(f"{name}, line 1: the file is empty; it is not a trace of specdec")
    if not has_ended:
        yield _warning(number, "there is no end line: the run was interrupted, or is still going on")


def parse_line(raw: bytes) -> dict[str, Any]:
    """One line as a dict; ValueError if it is no JSON object with a type."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(line, dict) or not isinstance(line.get("type"), str):
        raise ValueError('not a JSON object with a "type"')
    return line


def check_head(name: str, line: dict[str, Any]) -> None:
    """Whether the first line is that of a trace which this version reads; ValueError if not."""
    if line["type"] != "provenance" or not isinstance(line.get("schema"), int):
        raise ValueError(f"{name}, line 1: a trace of specdec begins with its provenance, got type {line['type']!r}")
    if line["schema"] > SCHEMA:
        raise ValueError(
            f"{name}, line 1: schema {line['schema']} is newer than this version of specdec reads ({SCHEMA}); update it"
        )


def _warning(number: int, message: str) -> dict[str, Any]:
    return {"type": "warning", "line": number, "message": message}
