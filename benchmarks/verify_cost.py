"""What one pass over n new tokens costs, with transformers' own linear layers and with packed ones, side by side.

    python benchmarks/verify_cost.py --dtype float32 --output benchmarks/verify-cost-float32.json

Both engines run in one process, interleaved size by size; medians and quartiles over the rounds, and ratios to the
one-token pass of the plain engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from specdec.accelerate import accelerated
from specdec.cli.loading import model_facts
from specdec.files import write_json
from specdec.interfaces import Row
from specdec.models import DEFAULT_MODEL, load_model
from specdec.packed_linear import packing_fault
from specdec.provenance import collect
from specdec.target import CausalLM
from specdec.tree import TokenTree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def binary_tree(root: int, size: int) -> TokenTree:
    """``size`` nodes, two children each."""
    return TokenTree((root, *range(100, 99 + size)), (-1, *((i - 1) // 2 for i in range(1, size))))


def measure(model: Any, context: int, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of each pass, by engine and size; the first round warms up and is left out."""
    engines = {"plain": CausalLM(model), "packed": CausalLM(accelerated(model))}
    ids = torch.randint(1000, 20000, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {name: Row(0, list(ids), context + 64) for name in engines}
    for name, engine in engines.items():
        engine.open([rows[name]])
        engine.score([rows[name]], [TokenTree.root(ids[-1])])
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in engines}
    for number in range(rounds + 1):
        for size in SIZES:
            for name, engine in engines.items():
                started = time.perf_counter()
                engine.score([rows[name]], [binary_tree(ids[-1], size)])
                if number:
                    times[name][size].append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = load_model(given.target, dtype=given.dtype, device="cpu")
    if fault := packing_fault(model.dtype):
        sys.exit(f"error: {fault}")
    times = measure(model, given.context, given.rounds)
    unit = statistics.median(times["plain"][1])
    curves = {
        name: {
            str(size): {
                "median_s": statistics.median(seconds),
                "quartiles_s": statistics.quantiles(seconds, n=4)[::2],
                "ratio": statistics.median(seconds) / unit,
            }
            for size, seconds in sizes.items()
        }
        for name, sizes in times.items()
    }
    for name, sizes in curves.items():
        print(name, "  ".join(f"{size}: {entry['ratio']:.2f}" for size, entry in sizes.items()))
    if given.output is not None:
        facts = {"target": model_facts(given.target)}
        settings = {"context": given.context, "rounds": given.rounds}
        provenance = collect(sys.argv, dtype=given.dtype, device="cpu", models=facts, settings=settings)
        write_json(given.output, {"schema": 1, "provenance": provenance, "curves": curves})


if __name__ == "__main__":
    main()
