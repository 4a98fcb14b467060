"""From lines of a trace to columns, in two lanes.

Steps as TraceWriter writes them without probabilities go the fast lane: their keys come in one fixed order, so once a
whole chunk is seen to have that layout, keys can be cut out of the bytes and the numbers parsed without building a dict
for each line. Everything else goes the slow lane, through JSON. Both give the same columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.analysis.columns import KEPT, TREE

Columns = dict[str, NDArray[Any]]

STEP = b'{"type":"step",'
_ROW = b',"row":'
_LAYOUT = (
    b'"row":"index":"position":"tokens":[]"nodes":[]"tree_tokens":[]"tree_parents":[]'
    b'"num_drafted":"num_accepted":"num_rows":"draft_s":"score_s":"verify_s":"finished":'
)
_NUMERIC = b"0123456789.-+e,"
_DONE, _RUNNING = (word.translate(None, _NUMERIC) for word in (b"true}", b"false}"))
_SKELETON = _LAYOUT.translate(None, _NUMERIC) + _RUNNING + b"\n"
_NEVER = b"\n"  # what no line begins with
_LETTERS = b'abcdefghijklmnopqrstuvwxyz"_:{}\n'
_LISTS = ("tokens", "nodes", "tree_tokens", "tree_parents")
_SCALARS = ("row", "index", "position", "num_drafted", "num_accepted", "num_rows", "draft_s", "score_s", "verify_s")
OPTIONAL = ("node_probs", "draft_probs", "estimates", "token_probs", "entropies")


class Heads:
    """Codes of the labels in front of the steps' numbers: a few for many lines, so each is parsed once."""

    def __init__(self) -> None:
        self.codes: dict[bytes, int] = {}
        self.parsed: list[dict[str, Any]] = []

    def code(self, head: bytes) -> int:
        """The number of ``head``, the line up to its row.

        Raises:
            ValueError: it is not the beginning of a JSON object.
        """
        if head not in self.codes:
            parsed = json.loads(head + b"}")
            self.codes[head] = len(self.parsed)
            self.parsed.append(parsed)
        return self.codes[head]


def fast_columns(lines: Sequence[bytes], heads: Heads) -> tuple[Columns | None, list[int]]:
    """Columns of the steps among ``lines``, or None if one is not exactly as TraceWriter writes it; and which lines are
    no steps.
    """
    tails: list[bytes] = []
    begins, codes, others = list[int](), list[int](), list[int]()
    last, cut = _NEVER, 0
    for number, line in enumerate(lines):
        if not line.startswith(last):
            if not line.startswith(STEP):
                others.append(number)
                continue
            end = line.find(_ROW)
            if end < 0 or (code := _code(heads, line[:end])) < 0:
                return None, []
            last, cut = line[: end + 1], end + 1
            begins.append(len(tails))
            codes.append(code)
        tails.append(line[cut:])
    columns = _numbers(b"".join(tails), len(tails)) if tails else None
    if columns is not None:
        columns["label"] = np.repeat(codes, np.diff([*begins, len(tails)]))
    return columns, others


def _code(heads: Heads, head: bytes) -> int:
    try:
        return heads.code(head)
    except ValueError:
        return -1


def _numbers(text: bytes, num_steps: int) -> Columns | None:
    """The numbers of steps without their labels, if every line has the fixed layout."""
    # What is left of a line without its numbers is the same for all.
    skeleton = text.translate(None, _NUMERIC).replace(_DONE, _RUNNING)
    if skeleton != _SKELETON * num_steps:
        return None
    pieces = text.replace(b"[", b"]").split(b"]")
    flat = b"".join(pieces[0::8]).replace(b"e-", b"E-").translate(None, _LETTERS).replace(b",,", b",")
    try:
        lists = [np.fromstring(b",".join(pieces[i::8]), dtype=np.int64, sep=",") for i in (1, 3, 5, 7)]
        scalars = np.fromstring(flat.strip(b","), dtype=np.float64, sep=",")
    except (ValueError, DeprecationWarning):
        return None
    if len(scalars) != num_steps * len(_SCALARS):
        return None
    table = scalars.reshape(num_steps, len(_SCALARS))
    columns: Columns = {name: table[:, i] for i, name in enumerate(_SCALARS)}
    columns |= dict(zip(_LISTS, lists, strict=True))
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    columns["finished"] = np.frombuffer(text, np.uint8)[ends - 3] == ord("u")  # of true, not of false
    kept, nodes = (int(columns[name].sum()) + num_steps for name in ("num_accepted", "num_drafted"))
    return columns if [len(each) for each in lists] == [kept, kept, nodes, nodes] else None


def slow_columns(steps: Sequence[Mapping[str, Any]], codes: Sequence[int]) -> Columns:
    """Columns of parsed steps.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or of another kind, or lengths do not fit each other.
    """
    for step in steps:
        kept, nodes = len(step["nodes"]), len(step["tree_tokens"])
        if kept != len(step["tokens"]) or kept != step["num_accepted"] + 1:
            raise ValueError("tokens, nodes and num_accepted do not fit each other")
        if nodes != len(step["tree_parents"]) or nodes != step["num_drafted"] + 1:
            raise ValueError("tree_tokens, tree_parents and num_drafted do not fit each other")
    columns: Columns = {name: np.array([step[name] for step in steps], np.float64) for name in _SCALARS}
    for name in _LISTS:
        columns[name] = np.array([value for step in steps for value in step[name]], np.int64)
    columns["finished"] = np.array([bool(step["finished"]) for step in steps])
    columns["label"] = np.array(codes, np.int64)
    for name in OPTIONAL:
        if any(step.get(name) for step in steps):
            columns[name] = _optional(steps, name)
    return columns


def _optional(steps: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    values: list[float] = []
    for step in steps:
        length = len(step["nodes"] if name in KEPT else step["tree_tokens"])
        given = step.get(name) or [None] * length
        if len(given) != length:
            raise ValueError(f"{name} must have {length} numbers, got {len(given)}")
        values += [np.nan if value is None else float(value) for value in given]
    return np.array(values, np.float64)


def join(blocks: Sequence[Columns]) -> Columns:
    """One block of all; optional columns that a block lacks are NaN there."""
    names = list(dict.fromkeys(name for block in blocks for name in block))
    return {name: np.concatenate([_filled(block, name) for block in blocks]) for name in names}


def _filled(block: Columns, name: str) -> NDArray[Any]:
    if name in block:
        return block[name]
    return np.full(len(block["tree_tokens"] if name in TREE else block["nodes"]), np.nan)
