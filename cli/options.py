"""Options that several commands share, each with its help text. What belongs to specdec.settings takes its words from there."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.settings import DEFAULTS, Settings, meaning

if TYPE_CHECKING:
    from specdec.records.tuned import Tuned

Target = Annotated[
    str,
    typer.Option(
        "--target", metavar="MODEL", help="The model to generate with: a built-in name, a folder or a Hub id."
    ),
]
DEFAULT_MAX_NEW_TOKENS = 128
DRAFTER_FORM = "NAME[:OPTION=VALUE,...]"
QUOTING = """A value with a comma stands in quotes: 'eagle:path="a,b"'."""

DrafterModel = Annotated[
    list[str] | None,
    typer.Option(
        "--drafter-model",
        metavar="MODEL",
        help="The draft model, for drafters that run one; given again, their trees are merged.",
    ),
]
Verifier = Annotated[str, typer.Option("--verifier", metavar="NAME", help=f"{meaning('verifier')} See specdec doctor.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="The most tokens to generate for one prompt.")
]
OwnTemperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="X",
        help="0 is greedy decoding. Default: as the model's generation config says, greedy if it says nothing.",
    ),
]
Temperature = Annotated[float, typer.Option("--temperature", metavar="X", help="0 is greedy decoding.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help=meaning("seed"))]
MaxNodes = Annotated[int, typer.Option("--max-nodes", metavar="N", help=meaning("max_nodes"))]
Adaptive = Annotated[bool, typer.Option("--adaptive/--fixed", help=meaning("adaptive"))]
Accelerate = Annotated[bool, typer.Option("--accelerate/--no-accelerate", help=meaning("accelerate"))]
CudaGraphs = Annotated[bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help=meaning("cuda_graphs"))]
Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16; auto is float32 on the CPU."),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda; auto is cuda where there is a GPU.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="CPU threads of the model; torch's own choice by default.")
]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How the models run here."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: Threads = None


@dataclass(frozen=True, kw_only=True)
class Engine(Machine):
    """How the models run here."""

    accelerate: Accelerate = True
    cuda_graphs: CudaGraphs = False


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How to speculate.

    Named as in ``specdec.settings``; all of them are passed to ``specdec.generate``.
    """

    verifier: Verifier = str(DEFAULTS.verifier)
    max_nodes: MaxNodes = DEFAULTS.max_nodes
    adaptive: Adaptive = DEFAULTS.adaptive
    seed: Seed = 0

    def settings(self, **others: Any) -> Settings:
        """These options, with ``others`` beside them or in their place."""
        return Settings(**{**{field.name: getattr(self, field.name) for field in fields(Speculation)}, **others})


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.json", help="Settings of specdec tune: drafter, --max-nodes and --adaptive/--fixed."
    ),
]


def read_config(path: Path | None) -> Tuned | None:
    """The tuned settings at ``path``.

    Raises:
        ValueError: they are none, or damaged.
    """
    if path is None:
        return None
    from specdec.records.tuned import load_tuned

    return load_tuned(path)


def warn_config(tuned: Tuned | None, model: Any) -> None:
    """A line on standard error if ``tuned`` was made for another model, dtype or machine."""
    warning = None if tuned is None else tuned.warning(model)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)


def set_threads(threads: int | None) -> None:
    """Let torch use ``threads`` CPU threads.

    Raises:
        ValueError: fewer than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)
