"""Traces as columns: one or many files, streamed. Needs neither torch nor a model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from specdec.analysis.columns import Label, Output, Run, Steps, Trace, offsets_of
from specdec.analysis.jsonl import DAMAGE, Columns, Heads, fast_columns, join, slow_columns
from specdec.records.trace import check_head, parse_line

_CHUNK = 1 << 18  # bytes; small enough to stay in a processor's cache
_LABELS = ("method", "drafter", "verifier", "question_id", "category", "turn")


def load(*paths: str | Path) -> Trace:
    """Read traces. A run that was cut short is taken as far as it goes, with a UserWarning that says what is missing.

    Raises:
        ValueError: no file was named, or one is not a trace; the message names the line.
        OSError: a file cannot be read.
    """
    if not paths:
        raise ValueError("name at least one trace, a file that specdec bench --trace wrote")
    files = [_File(number, str(path)) for number, path in enumerate(paths)]
    for file in files:
        file.read()
        for warning in file.warnings:
            warnings.warn(f"{file.path}: {warning}", stacklevel=2)
    labels: dict[Label, int] = {}
    blocks = [block for file in files for block in file.coded(labels)]
    return Trace(
        runs=tuple(Run(file.path, file.provenance, tuple(file.warnings), file.texts) for file in files),
        labels=tuple(labels),
        steps=_steps(blocks),
        outputs=tuple(output for file in files for output in file.outputs),
        prompts={key: ids for file in files for key, ids in file.prompts.items()},
    )


class _File:
    """One file while it is read."""

    def __init__(self, number: int, path: str) -> None:
        self.number, self.path = number, path
        self.provenance: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.texts: dict[int, str] = {}
        self.outputs: list[Output] = []
        self.prompts: dict[tuple[int, str, int], tuple[int, ...]] = {}
        self.heads = Heads(partial(_label, run=number))
        self.blocks: list[Columns] = []
        self.has_ended = False

    def read(self) -> None:
        line = 1
        for chunk in _chunks(self.path):
            if line == 1:
                self._head(chunk[0])
            self._add(chunk, line)
            line += len(chunk)
        if line == 1:
            raise ValueError(f"{self.path}, line 1: the file is empty; it is not a trace of specdec")
        if not self.has_ended:
            self._warn_missing()

    def _head(self, raw: bytes) -> None:
        try:
            self.provenance = parse_line(raw)
        except ValueError as error:
            raise ValueError(f"{self.path}, line 1: {error}; it is not a trace of specdec") from None
        check_head(self.path, self.provenance)

    def _add(self, chunk: list[bytes], first: int) -> None:
        """Lines of a chunk, of which the first has the number ``first`` in the file."""
        if not chunk[-1].endswith(b"\n"):
            try:
                parse_line(chunk[-1])
            except ValueError:
                chunk = chunk[:-1]
                self.warnings.append("the last line is cut short and was left out")
        columns, others = fast_columns(chunk, self.heads)
        lines = {first + i: self._parse(chunk[i], first + i) for i in others}
        if columns is not None and any(line["type"] == "step" for line in lines.values()):
            columns = None  # steps stay in the order of the file
            lines = {number: self._parse(raw, number) for number, raw in enumerate(chunk, first)}
        steps = {number: line for number, line in lines.items() if line["type"] == "step"}
        for number, line in lines.items():
            if number not in steps:
                self._add_line(line, number)
        if steps:
            columns = self._slow(steps)
        if columns is not None:
            self.blocks.append(columns)

    def _parse(self, raw: bytes, number: int) -> dict[str, Any]:
        try:
            return parse_line(raw)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: {error}; it is not a trace of specdec") from None

    def _slow(self, steps: Mapping[int, Mapping[str, Any]]) -> Columns:
        """Columns of steps by their line numbers."""
        try:
            return slow_columns(list(steps.values()), [self._code(step) for step in steps.values()])
        except DAMAGE:
            for number, step in steps.items():
                try:
                    slow_columns([step], [self._code(step)])
                except DAMAGE as error:
                    raise self._damaged("step", number, error) from None
            raise

    def _code(self, step: Mapping[str, Any]) -> int:
        labels = json.dumps({name: step[name] for name in _LABELS if name in step})
        return self.heads.code(labels[:-1].encode())

    def _damaged(self, kind: str, number: int, error: Exception) -> ValueError:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        return ValueError(f"{self.path}, line {number}: a damaged {kind} ({what})")

    def _add_line(self, line: Mapping[str, Any], number: int) -> None:
        kind = line["type"]
        try:
            if kind == "output":
                self.outputs.append(_output(line, self.number))
            elif kind == "prompt":
                key = (self.number, str(line["question_id"]), int(line["turn"]))
                self.prompts[key] = tuple(map(int, line["token_ids"]))
            elif kind == "vocabulary":
                self.texts |= {int(token): str(text) for token, text in line["texts"].items()}
        except DAMAGE as error:
            raise self._damaged(kind, number, error) from None
        self.has_ended = kind == "end"

    def _warn_missing(self) -> None:
        asked = (self.provenance.get("settings") or {}).get("num_prompts")
        num_questions = len({output.label.question_id for output in self.outputs})
        of = f" of {asked}" if isinstance(asked, int) else ""
        self.warnings.append(
            f"there is no end line, the run was interrupted or is still going on; it holds {num_questions}{of} questions"
        )

    def coded(self, labels: dict[Label, int]) -> list[Columns]:
        """The steps of the file, with codes into ``labels``, which grows by those that are new."""
        codes = np.array([labels.setdefault(label, len(labels)) for label in self.heads.labels])
        return [block | {"label": codes[block["label"]]} for block in self.blocks]


def _chunks(path: str) -> Iterator[list[bytes]]:
    """Whole lines, some hundred kilobytes at a time; only the last of all may lack its end."""
    rest = b""
    with Path(path).expanduser().open("rb") as file:
        while data := file.read(_CHUNK):
            data = rest + data
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if end:
                yield data[:end].splitlines(keepends=True)
    if rest:
        yield [rest]


def _label(line: Mapping[str, Any], run: int) -> Label:
    drafter, verifier = line.get("drafter"), line.get("verifier")
    return Label(
        run=run,
        method=str(line.get("method")),
        drafter=None if drafter is None else str(drafter),
        verifier=None if verifier is None else str(verifier),
        question_id=str(line.get("question_id", "")),
        category=str(line.get("category", "")),
        turn=int(line.get("turn") or 0),
    )


def _output(line: Mapping[str, Any], run: int) -> Output:
    lossless = line.get("lossless")
    return Output(
        label=_label(line, run),
        group=int(line["group"]),
        num_rows=int(line["num_rows"]),
        num_prompt_tokens=int(line["num_prompt_tokens"]),
        token_ids=tuple(map(int, line["token_ids"])),
        wall_s=float(line["wall_s"]),
        prefill_s=float(line["prefill_s"]),
        lossless=lossless if isinstance(lossless, bool) else None,
    )


def _steps(blocks: Sequence[Columns]) -> Steps:
    if not blocks:
        none, nothing = np.zeros(0, np.int64), np.zeros(0)
        start = np.zeros(1, np.int64)
        return Steps(*(none,) * 5, *(nothing,) * 3, nothing.astype(np.bool_), start, none, none, start, none, none)
    columns: dict[str, Any] = join(blocks)
    kept, tree = (offsets_of(columns.pop(name) + 1) for name in ("num_accepted", "num_drafted"))
    return Steps(**columns, kept_offsets=kept, tree_offsets=tree)
