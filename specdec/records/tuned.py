"""What ``specdec tune`` found for one target on one machine: its file, read and checked. See docs/tuning.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.budget.costs import PassCosts
from specdec.records.provenance import machine

SCHEMA = 1
KIND = "tuned"


@dataclass(frozen=True, slots=True)
class TunedEntry:
    """The best configuration for one batch size."""

    batch_size: int
    drafter: str  # "none": speculation does not pay
    max_nodes: int
    adaptive: bool
    predicted: float  # speedup of whole answers against plain decoding
    measured: tuple[float, float, float] | None  # the same with its 95 % interval
    predicted_decode: float | None  # speedup behind the pass that holds the prompt; None: an older file
    measured_decode: tuple[float, float, float] | None
    cost_curve: Mapping[int, float]  # columns -> seconds of a pass
    acceptance_table: Sequence[Sequence[float]]  # (D, R), see specdec.drafters.trees.shapes; of the best tree drafter


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuned.json."""

    path: str
    target: str
    dtype: str
    fingerprint: str
    machine: Mapping[str, Any]
    entries: tuple[TunedEntry, ...]

    def nearest(self, batch_size: int) -> TunedEntry:
        """The entry for the batch size that is nearest."""
        return min(self.entries, key=lambda entry: (abs(entry.batch_size - batch_size), entry.batch_size))

    def costs(self) -> PassCosts:
        """What passes cost, to begin with."""
        return PassCosts.seeded({entry.batch_size: entry.cost_curve for entry in self.entries})

    def warning(self, model: Any) -> str | None:
        """Why these settings may not be the best for ``model`` here; None if nothing speaks against them."""
        here, dtype = machine(), str(model.dtype).removeprefix("torch.")
        differences = []
        if fingerprint(model) != self.fingerprint:
            differences.append(f"another model ({self.fingerprint}; this is {fingerprint(model)})")
        if dtype != self.dtype:
            differences.append(f"another dtype ({self.dtype}; this is {dtype})")
        if any(here[key] != self.machine.get(key) for key in ("cpu", "gpus", "usable_cores")):
            differences.append(f"another machine ({self.machine.get('cpu')}, {self.machine.get('usable_cores')} cores)")
        if not differences:
            return None
        return f"{self.path} was tuned for {' and '.join(differences)}: its settings may be poor here; run specdec tune again"


def fingerprint(model: Any) -> str:
    """A model's architecture in words: enough to notice that another one was tuned."""
    config = model.config.get_text_config()
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"vocabulary {config.vocab_size}"
    )


def load_tuned(path: str | Path) -> Tuned:
    """Read a file of ``specdec tune``.

    Raises:
        ValueError: it cannot be read, is no such file, or is damaged.
    """
    name = str(path)
    try:
        content = json.loads(Path(path).expanduser().read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read the tuned settings {name} ({error.strerror}); make them with specdec tune"
        ) from None
    except ValueError:
        raise ValueError(f"{name} is not a JSON file; make tuned settings with specdec tune --output {name}") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{name} holds no tuned settings; make them with specdec tune --output FILE.json")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{name} has schema {content.get('schema')!r}, expected {SCHEMA}; run specdec tune again")
    try:
        return _parse(name, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name} is damaged ({type(error).__name__}: {error}); run specdec tune again") from None


def _parse(name: str, content: Mapping[str, Any]) -> Tuned:
    entries = [_entry(int(size), entry) for size, entry in content["per_batch_size"].items()]
    if not entries:
        raise ValueError("it has no batch sizes")
    where = content["provenance"]
    return Tuned(
        name,
        str(content["target"]),
        str(where["dtype"]),
        str(content["fingerprint"]),
        dict(where["machine"]),
        tuple(sorted(entries, key=lambda e: e.batch_size)),
    )


def _entry(batch_size: int, content: Mapping[str, Any]) -> TunedEntry:
    curve = {int(columns): float(seconds) for columns, seconds in content["cost_curve"].items()}
    max_nodes = int(content["max_nodes"])
    if batch_size < 1 or max_nodes < 0 or not all(n >= 1 and 0 < s < float("inf") for n, s in curve.items()):
        raise ValueError("sizes and seconds must be positive")
    if not isinstance(content["drafter"], str):
        raise TypeError("drafter must be text")
    return TunedEntry(
        batch_size,
        content["drafter"],
        max_nodes,
        bool(content["adaptive"]),
        float(content["predicted"]),
        _interval(content["measured"]),
        None if content.get("predicted_decode") is None else float(content["predicted_decode"]),
        _interval(content.get("measured_decode")),
        curve,
        tuple(tuple(float(p) for p in row) for row in content["acceptance_table"]),
    )


def _interval(content: Any) -> tuple[float, float, float] | None:
    return None if content is None else (float(content[0]), float(content[1]), float(content[2]))
