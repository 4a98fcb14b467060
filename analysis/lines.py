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
_SKELETONS = tuple(
    _LAYOUT.translate(None, _NUMERIC) + end.translate(None, _NUMERIC) for end in (b"true}\n", b"false}\n")
)
_END = b"true}\n"
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


def fast_columns(lines: Sequence[bytes], heads: Heads) -> Columns | None:
    """Columns of step lines, or None if one of them is not exactly as TraceWriter writes it."""
    tails, codes, last, code = [], [], _NEVER, -1
    for line in lines:
        if not line.startswith(last):
            end = line.find(_ROW)
            if end < 0:
                return None
            last = line[: end + 1]
            try:
                code = heads.code(line[:end])
            except ValueError:
                return None
            cut = len(last)
        tails.append(line[cut:])
        codes.append(code)
    text = b"".join(tails)
    finished = [line.endswith(_END) for line in lines]
    if not _fits(text, finished):
        return None
    pieces = text.replace(b"[", b"]").split(b"]")
    try:
        lists = [np.fromstring(b",".join(pieces[i::8]), dtype=np.int64, sep=",") for i in (1, 3, 5, 7)]
        flat = b"".join(pieces[0::8]).replace(b"e-", b"E-").translate(None, _LETTERS).replace(b",,", b",")
        scalars = np.fromstring(flat.strip(b","), dtype=np.float64, sep=",")
    except (ValueError, DeprecationWarning):
        return None
    if len(scalars) != len(lines) * len(_SCALARS):
        return None
    table = scalars.reshape(len(lines), len(_SCALARS))
    columns: Columns = {name: table[:, i] for i, name in enumerate(_SCALARS)}
    columns |= dict(zip(_LISTS, lists, strict=True))
    columns |= {"finished": np.array(finished), "label": np.array(codes)}
    kept, nodes = (int(columns[name].sum()) + len(lines) for name in ("num_accepted", "num_drafted"))
    return columns if [len(each) for each in lists] == [kept, kept, nodes, nodes] else None


def _fits(text: bytes, finished: Sequence[bool]) -> bool:
    """Whether every line has the fixed layout: what is left without numbers is the same for all."""
    done, running = _SKELETONS
    expected = b"".join([done if each else running for each in finished])
    return text.translate(None, _NUMERIC) == expected


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
