"""What the kernels bring on a GPU, in sections that each stay below ten minutes; a plain table comes last.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py attention steps --output gpu.json
    python benchmarks/gpu.py end_to_end --sizes 1b,3b,8b --output gpu.json
    python benchmarks/gpu.py --dry-run --output /dev/null

``--dry-run`` runs every section on a CPU at toy size, through the simulator if there is a g++: its times mean nothing.
Alternatives take turns: ``us`` is the median over rounds between quartiles ``q1`` and ``q3``, ``ratio`` the time
against the first alternative between ``low`` and ``high``; ``noted`` says why something was left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_sections.attention import attentions
from gpu_sections.device import ceilings, tests
from gpu_sections.passes import captured_passes, model_steps
from gpu_sections.shapes import SHAPES
from gpu_sections.steps import steps
from gpu_sections.text import end_to_end
from gpu_sections.timing import Run
from gpu_sections.verdicts import verdicts

from specdec.records.files import write_json
from specdec.records.provenance import collect

SECTIONS: dict[str, Callable[[Run], None]] = {
    "ceilings": ceilings,
    "tests": tests,
    "attention": attentions,
    "steps": steps,
    "verdicts": verdicts,
    "model": model_steps,
    "captured": captured_passes,
    "end_to_end": end_to_end,
}


def simulate() -> None:
    """Run kernels through the simulator of the tests if there is a g++, else their torch twins."""
    # A dry run tries this script, not the kernels: it may use what the tests use. On a GPU nothing of it is imported.
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))
    import simulator

    if not simulator.unavailable():
        os.environ.setdefault("SPECDEC_KERNELS", "sim")


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        numbers = "  ".join(f"{key} {value}" for key, value in row.items() if key not in ("section", "what"))
        lines.append(f"{row['section']:<11} {row['what']:<62} {numbers}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; none: all")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", default="1b,8b", help=f"of inflated models: {', '.join(SHAPES)}")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    sizes = tuple(given.sizes.split(","))
    for what, wanted, known in (("sections", given.sections, SECTIONS), ("sizes", sizes, SHAPES)):
        if unknown := set(wanted) - set(known):
            parser.error(f"unknown {what}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run tries every section on a CPU")
    if given.dry_run:
        simulate()
    torch.manual_seed(0)
    run = Run("cpu" if given.dry_run else "cuda", given.dry_run, 1 if given.dry_run else given.rounds, sizes)
    settings = {"sections": given.sections, "rounds": run.rounds, "dry_run": run.is_dry, "sizes": sizes}
    dtype = str(run.dtype).removeprefix("torch.")
    for name in given.sections or SECTIONS:
        with torch.inference_mode():
            SECTIONS[name](run)
        provenance = collect(sys.argv, dtype=dtype, device=run.device, models={}, settings=settings)
        write_json(given.output, {"schema": 1, "provenance": provenance, "rows": run.rows})
    print(table(run.rows))


if __name__ == "__main__":
    main()
