"""Every option of speculation, once: its name, its default and what it means.

``specdec.generate``, the command line and docs/library.md are held to this list by a test. Imports nothing, so that
``--help`` can show it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from specdec.interfaces import Drafter, Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to speculate."""

    drafter: str | Path | Drafter = field(
        default="auto",
        metadata={"help": "Who proposes: a name with options, an object, or a file of specdec tune."},
    )
    verifier: str | Verifier = field(default="match", metadata={"help": "Who decides: a name or an object."})
    max_nodes: int = field(
        default=16, metadata={"help": "The largest draft tree, in nodes below the root; 0 drafts nothing."}
    )
    adaptive: bool = field(
        default=True,
        metadata={
            "help": "Size each tree by what it costs and brings on this machine, down to none; or always up to max_nodes."
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of the sampling noise; the same seed gives the same text."}
    )
    accelerate: bool = field(
        default=False,
        metadata={"help": "On a CPU, run the models with packed layers; nothing changes but the order of sums."},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={"help": "On a GPU, run on our attention kernels and replay forward passes as CUDA graphs."},
    )


DEFAULTS = Settings()


def meaning(option: str) -> str:
    """What ``option`` means, in a sentence."""
    return str(next(each for each in fields(Settings) if each.name == option).metadata["help"])
