"""The file of a table of successors and of the rates that were learned with it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.lookup.class_rates import ClassRates
from specdec.drafters.lookup.successors import NUM_CLASSES, SuccessorTable
from specdec.records.files import write_file

_FORMAT = 2  # raise it when the layout of a file, the classes or the hash changes


def save_table(path: Path, table: SuccessorTable, rates: ClassRates, vocab_size: int) -> None:
    """Write ``table`` and ``rates`` to ``path``, all of it or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    orders, slots = table.keys.nonzero()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, NumPy adds an ending of its own
            np.savez(
                file,
                facts=np.array(list(_facts(table, vocab_size).values()), np.int64),
                slots=np.stack([orders, slots]),
                keys=table.keys[orders, slots],
                successors=table.successors[orders, slots],
                classes=table.classes[orders, slots],
                rates=np.array([rates.hits, rates.trials]),
            )

    write_file(path, write, mode=0o600)  # it holds tokens of prompts and outputs


def load_table(path: Path, table: SuccessorTable, vocab_size: int) -> ClassRates:
    """Fill the empty ``table`` from ``path`` and return the rates.

    Raises:
        ValueError: the file holds no whole table, or one of other sizes.
    """
    advice = f"delete {path}, or name another path"
    expected = _facts(table, vocab_size)
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            data: dict[str, NDArray[Any]] = dict(file)
        facts = dict(zip(expected, data["facts"].tolist(), strict=True))
        wrong = [f"{key}={facts[key]}" for key, value in expected.items() if facts[key] != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole table of drafter 'recycling' ({error}); {advice}") from error
    if wrong:
        wanted = ", ".join(f"{key}={value}" for key, value in expected.items())
        raise ValueError(f"{path} holds a table with {', '.join(wrong)}, and this one has {wanted}; {advice}")
    try:
        return _filled(table, data, vocab_size)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a whole table of drafter 'recycling' ({error}); {advice}") from error


def _filled(table: SuccessorTable, data: dict[str, NDArray[Any]], vocab_size: int) -> ClassRates:
    """Check everything, then write it into ``table``."""
    orders, slots = data["slots"]
    successors = np.asarray(data["successors"], np.int32)
    if successors.min(initial=0) < -1 or successors.max(initial=0) >= vocab_size:
        raise ValueError("token ids outside the vocabulary")
    if min(orders.min(initial=0), slots.min(initial=0)) < 0:
        raise ValueError("slots outside the table")
    classes = np.asarray(data["classes"], np.uint8)
    if classes.max(initial=0) >= NUM_CLASSES:
        raise ValueError("unknown classes")
    hits, trials = data["rates"].reshape(2, table.max_order + 1, NUM_CLASSES)
    if not ((hits >= 0).all() and (trials > 0).all() and (hits <= trials).all() and np.isfinite(trials).all()):
        raise ValueError("rates that are none")
    table.keys[orders, slots] = data["keys"]
    table.successors[orders, slots] = successors
    table.classes[orders, slots] = classes
    return ClassRates(hits.tolist(), trials.tolist())


def _facts(table: SuccessorTable, vocab_size: int) -> dict[str, int]:
    """What a file must agree with."""
    return {
        "format": _FORMAT,
        "vocab_size": vocab_size,
        "max_order": table.max_order,
        "num_successors": table.num_successors,
        "capacity": table.capacity,
    }
