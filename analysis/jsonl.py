"""From lines of a trace to columns, in two lanes.

TraceWriter writes the keys of a step in one fixed order. Chunks of lines that keep to it go the fast lane: they are cut
at the keys, and what all lines have in one field is parsed together, without a dict for each line. Everything else goes
the slow lane, line by line. Both leave numbers to JSON and give the same columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.analysis.columns import KEPT, TREE, Label

Columns = dict[str, NDArray[Any]]

DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what reading a damaged line raises

STEP = b'{"type":"step",'
_ROW = b',"row":'
_NEVER = b"\n"  # what no line begins with
_FIELDS = (
    "row", "index", "position", "tokens", "nodes", "tree_tokens", "tree_parents", "num_drafted", "num_accepted",
    "num_rows", "draft_s", "score_s", "verify_s", "finished",
)  # fmt: skip
OPTIONAL = ("node_probs", "draft_probs", "estimates", "token_probs", "entropies")
_LISTS = KEPT | TREE
_WHOLE: tuple[np.dtype[Any], str] = np.dtype(np.int64), "whole numbers"
_KINDS = (
    dict.fromkeys(_FIELDS, _WHOLE)
    | dict.fromkeys(("draft_s", "score_s", "verify_s", *OPTIONAL), (np.dtype(np.float64), "numbers"))
    | {"finished": (np.dtype(np.bool_), "true or false")}
)

# How a line ends that has some of the optional fields, and how it would end with all of them, the others empty.
_SOME = b'"finished":(true|false)' + b"".join(b'(?:,"%s":\\[([^]]*)])?' % name.encode() for name in OPTIONAL) + b"}"
_ALL = b'"finished":\\1' + b"".join(b',"%s":[\\%d]' % (name.encode(), i) for i, name in enumerate(OPTIONAL, 2)) + b"}"
_NO_SHAPE = bytes(set(range(256)) - set(b",]"))


class Heads:
    """Codes of the labels in front of the steps' numbers: a few for many lines, so each is parsed once."""

    def __init__(self, parse: Callable[[Mapping[str, Any]], Label]) -> None:
        self.codes: dict[bytes, int] = {}
        self.labels: list[Label] = []
        self._parse = parse

    def code(self, head: bytes) -> int:
        """The number of ``head``, the line up to its row.

        Raises:
            TypeError, ValueError: it is not the beginning of a JSON object, or not one of labels.
        """
        if head not in self.codes:
            label = self._parse(json.loads(head + b"}"))
            self.codes[head] = len(self.labels)
            self.labels.append(label)
        return self.codes[head]


def fast_columns(lines: Sequence[bytes], heads: Heads) -> tuple[Columns | None, Sequence[int]]:
    """Columns of the steps among ``lines``, and which lines are no steps: None and all lines if a step is not exactly as
    TraceWriter writes it.
    """
    tails: list[bytes] = []
    begins, codes, others = list[int](), list[int](), list[int]()
    last, cut = _NEVER, 0
    try:
        for number, line in enumerate(lines):
            if not line.startswith(last):
                if not line.startswith(STEP):
                    others.append(number)
                    continue
                cut = line.index(_ROW)
                last = line[:cut] + _ROW
                begins.append(len(tails))
                codes.append(heads.code(line[:cut]))
            tails.append(line[cut:])
        if not tails:
            return None, others
        columns = _parsed(b"".join(tails), len(tails))
    except (*DAMAGE, RecursionError):
        return None, range(len(lines))
    columns["label"] = np.repeat(codes, np.diff([*begins, len(tails)]))
    return columns, others


def _parsed(text: bytes, num_steps: int) -> Columns:
    """Columns of steps without their labels.

    Raises:
        ValueError, RecursionError: a line is not as TraceWriter writes it.
    """
    fields = _fields(text, num_steps)
    columns: Columns = {}
    for name, (pieces, end) in fields.items():
        if name not in _LISTS:
            numbers = b"".join(pieces).replace(end, b",")
            values = json.loads(b"[" + numbers[:-1] + b"]")
            if len(values) != num_steps:
                raise ValueError(f"{name} must have one value in each line")
            columns[name] = _array(name, values)
    kept = _lists(fields, "tokens", KEPT, columns["num_accepted"])
    return columns | kept | _lists(fields, "tree_tokens", TREE, columns["num_drafted"])


def _fields(text: bytes, num_steps: int) -> dict[str, tuple[list[bytes], bytes]]:
    """For each field, a piece of every line that begins with its value; and what must follow the value, the next key.

    If not all lines have the same optional fields, those that a line lacks are empty lists.
    """
    names: tuple[str, ...] = _FIELDS
    pieces = text.split(b":")
    if len(pieces) != 1 + num_steps * len(names):
        names += OPTIONAL
        if len(pieces) != 1 + num_steps * len(names):
            pieces = re.sub(_SOME, _ALL, text).split(b":")
    pieces[-1] += _ROW[:-1]
    ends = [b',"%s"' % name.encode() for name in names[1:]] + [b"}\n" + _ROW[:-1]]
    return {name: (pieces[i + 1 :: len(names)], end) for i, (name, end) in enumerate(zip(names, ends, strict=True))}


def _lists(
    fields: Mapping[str, tuple[list[bytes], bytes]], first: str, names: frozenset[str], counts: NDArray[np.int64]
) -> Columns:
    """Columns of the lists called ``names``, which hold ``counts`` + 1 numbers; ``first`` is one that is never empty."""
    shape = _shape(fields[first][0])
    commas = shape.split(b"],")[:-1]
    if list(map(len, commas)) != counts.tolist():
        raise ValueError(f"{first} must have another length")
    columns: Columns = {}
    for name, (pieces, end) in fields.items():
        if name not in names:
            continue
        if name in OPTIONAL and (num_empty := pieces.count(b"[]" + end)):
            if num_empty == len(pieces):
                continue
            pieces = [
                b"[null" + b",null" * len(comma_run) + b"]" + end if piece == b"[]" + end else piece
                for piece, comma_run in zip(pieces, commas, strict=True)
            ]
        if _shape(pieces) != shape:
            raise ValueError(f"{name} must have another length")
        numbers = (b"".join(pieces) + b"[").replace(b"]" + end + b"[", b",")
        columns[name] = _array(name, json.loads(numbers[:-1] + b"]"))
    return columns


def _shape(lists: Sequence[bytes]) -> bytes:
    """The commas and ends of lists: the same for lists of the same lengths."""
    return b"".join(lists).translate(None, _NO_SHAPE)


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
    columns: Columns = {"label": np.array(codes, np.int64)}
    for name in _FIELDS:
        values = [step[name] for step in steps]
        columns[name] = _array(name, list(chain.from_iterable(values)) if name in _LISTS else values)
    for name in OPTIONAL:
        if any(step.get(name) for step in steps):
            columns[name] = _array(name, [value for step in steps for value in _given(step, name)])
    return columns


def _given(step: Mapping[str, Any], name: str) -> Sequence[float | None]:
    length = len(step["nodes"] if name in KEPT else step["tree_tokens"])
    numbers: Sequence[float | None] = step.get(name) or [None] * length
    if len(numbers) != length:
        raise ValueError(f"{name} must have {length} numbers, got {len(numbers)}")
    return numbers


def _array(name: str, values: Sequence[Any]) -> NDArray[Any]:
    """The column of these values; None is NaN in an optional field.

    Raises:
        ValueError: a value is of another kind.
    """
    kind, words = _KINDS[name]
    try:
        column = np.array(values, kind if name in OPTIONAL else None)
        if column.ndim == 1:
            return column.astype(kind, casting="safe", copy=False)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be {words}, got {values}")


def join(blocks: Sequence[Columns]) -> Columns:
    """One block of all; optional columns that a block lacks are NaN there."""
    names = list(dict.fromkeys(name for block in blocks for name in block))
    return {name: np.concatenate([_filled(block, name) for block in blocks]) for name in names}


def _filled(block: Columns, name: str) -> NDArray[Any]:
    if name in block:
        return block[name]
    return np.full(len(block["tree_tokens"] if name in TREE else block["nodes"]), np.nan)
