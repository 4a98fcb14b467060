"""JSON results of ``specdec bench --output``, with or without a workload, and ``specdec tune --output``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Bench:
    """A result of ``specdec bench``; the keys of a row are those of docs/bench.md."""

    path: str
    provenance: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    is_partial: bool

    def row(self, name: str) -> Mapping[str, Any]:
        """The row of a method or drafter.

        Raises:
            ValueError: there is none.
        """
        match = next((row for row in self.rows if name in (row["drafter"], row["method"])), None)
        if match is None:
            raise ValueError(f"{self.path} has no row {name!r}; it has {', '.join(map(row_name, self.rows))}")
        return match


@dataclass(frozen=True, slots=True)
class Tune:
    """A result of ``specdec tune``; the keys of an entry are those of docs/tuning.md."""

    path: str
    provenance: Mapping[str, Any]
    target: str
    entries: Mapping[int, Mapping[str, Any]]  # by batch size


@dataclass(frozen=True, slots=True)
class Workload:
    """A result of ``specdec bench --workload``; the keys of a row are those of docs/workloads.md."""

    path: str
    provenance: Mapping[str, Any]
    name: str
    num_requests: int
    rows: tuple[Mapping[str, Any], ...]
    is_partial: bool

    @property
    def paged(self) -> tuple[Mapping[str, Any], ...]:
        """The rows of our own engine for many requests, which tell of each pass."""
        return tuple(row for row in self.rows if row["kv"] is not None)


def row_name(row: Mapping[str, Any]) -> str:
    """What a row is called: the drafter with its options, or the method."""
    return str(row["drafter"] or row["method"])


def load_result(path: str | Path) -> Bench | Tune | Workload:
    """Read a result of any command.

    Raises:
        ValueError: it is none, of another schema, or damaged.
        OSError: it cannot be read.
    """
    name = str(path)
    try:
        content = json.loads(Path(path).expanduser().read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{name} is not a JSON file ({error}); give a result of specdec bench or specdec tune"
        ) from None
    if not isinstance(content, dict) or not ("rows" in content or content.get("kind") == "tuned"):
        raise ValueError(f"{name} is no result of specdec bench or specdec tune")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{name} has schema {content.get('schema')!r}, this version reads {SCHEMA}")
    try:
        where = dict(content["provenance"])
        if content.get("kind") == "workload":
            return _workload(name, where, content)
        if "rows" in content:
            for row in content["rows"]:
                _check_row(row)
            return Bench(name, where, tuple(content["rows"]), bool(content["partial"]))
        entries = {int(size): dict(entry) for size, entry in content["per_batch_size"].items()}
        return Tune(name, where, str(content["target"]), entries)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name} is damaged ({type(error).__name__}: {error})") from None


def _workload(name: str, where: Mapping[str, Any], content: Mapping[str, Any]) -> Workload:
    about, rows = content["workload"], tuple(content["rows"])
    for row in rows:
        for key in ("engine", "drafter", "inter_token_s", "lossless", "match", "requests"):
            row[key]
        for key in ("max_rows", "tokens_per_s"):
            float(row[key])
        float(row["first_token_s"]["p50"])
        if row["kv"] is not None:
            row["kv"]["passes"]["time_s"], row["kv"]["snapshot"]["rows"], int(row["kv"]["block_size"])
    return Workload(name, where, str(about["name"]), int(about["num_requests"]), rows, bool(content["partial"]))


def _check_row(row: Mapping[str, Any]) -> None:
    for key in ("method", "drafter", "lossless", "categories", "match", "mean_acceptance_length"):
        row[key]
    for key in ("speedup", "speedup_low", "speedup_high"):
        float(row[key])


def is_result(path: str | Path) -> bool:
    """Whether a file is meant as a result rather than a trace: by its ending."""
    return Path(path).suffix == ".json"
