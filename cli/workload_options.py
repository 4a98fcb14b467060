"""The options of ``specdec bench --workload``, and how engines are named. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from specdec.records.workloads import FORM, Spec, parse_workload

PAGED, RAGGED, HF, HF_BATCH = "paged", "ragged", "hf", "hf-batch"
ENGINES: dict[str, dict[str, Any]] = {  # options with their defaults
    PAGED: {"prefix_sharing": True, "block_size": 16, "token_budget": 512},
    RAGGED: {},
    HF: {},
    HF_BATCH: {"page_size": 32, "max_batch_tokens": 512},
}
_TRUTHS = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """Many requests instead of one prompt at a time."""

    workload: Annotated[
        str | None,
        typer.Option(
            "--workload", metavar=FORM, help="Serve this workload with each --engine, instead of comparing drafters."
        ),
    ] = None
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="NAME[:OPTION=VALUE,...]",
            help="paged: our engine; ragged: our loop on padded batches; hf: generate() on padded batches; hf-batch: "
            "transformers' continuous batching. Give it again for more. Default: paged and hf.",
        ),
    ] = None
    max_rows: Annotated[
        list[int] | None,
        typer.Option("--max-rows", metavar="N", help="Requests that run at a time; repeatable. Default: 16."),
    ] = None
    kv_memory: Annotated[
        str | None,
        typer.Option(
            "--kv-memory", metavar="SIZE", help="For keys and values of paged, such as 512MB. Default: its own."
        ),
    ] = None
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", help="Runs of every engine, in turn; the median counts.")
    ] = 1

    def __post_init__(self) -> None:
        for text in self.engines or ():
            parse_engine(text)
        for rows in (*(self.max_rows or ()), self.repeats):
            if rows < 1:
                raise ValueError(f"max_rows and repeats must be at least 1, got {rows}")
        if self.workload is not None:
            parse_workload(self.workload)
        elif self.engines or self.max_rows or self.kv_memory or self.repeats > 1:
            raise ValueError(
                f"--engine, --max-rows, --kv-memory and --repeats belong to a workload: add --workload {FORM}"
            )

    @property
    def spec(self) -> Spec:
        """The workload; there is one."""
        assert self.workload is not None
        return parse_workload(self.workload)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine as it was asked for."""

    text: str
    name: str
    options: tuple[tuple[str, Any], ...]

    def option(self, name: str) -> Any:
        """What was given for an option, or its default."""
        return dict(self.options).get(name, ENGINES[self.name][name])

    @property
    def is_ours(self) -> bool:
        return self.name in (PAGED, RAGGED)


def parse_engine(text: str) -> EngineSpec:
    """The engine that ``text`` names.

    Raises:
        ValueError: an unknown name or option, or a value of another kind.
    """
    name, _, rest = text.partition(":")
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
    options = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in ENGINES[name]:
            known = ", ".join(ENGINES[name]) or "none"
            raise ValueError(f"engine {name} has no option {key!r}; it has {known}; got {text!r}")
        options[key] = _read(key, value, ENGINES[name][key], text)
    return EngineSpec(text, name, tuple(options.items()))


def _read(key: str, value: str, default: Any, text: str) -> Any:
    if isinstance(default, bool):
        if value.lower() not in _TRUTHS:
            raise ValueError(f"{key} must be true or false, got {text!r}")
        return _TRUTHS[value.lower()]
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{key} must be a whole number of at least 1, got {text!r}")
    return int(value)
