"""What one pass over n new tokens costs: on transformers' own layers, on packed and fused ones, and compiled.

    python benchmarks/verify_cost.py --dtype float32 --compile --output benchmarks/verify-cost-float32.json

All engines run in one process, interleaved size by size; medians and quartiles over the rounds, and ratios to the
one-token pass of the plain engine. ``--compile`` adds ``torch.compile`` of the plain layers, with dynamic shapes: its
few compilations take minutes and are not counted. It does not lay out weights in advance (inductor's ``freezing``
would, for one shape at a time).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specdec.cli.loading import model_facts
from specdec.cpu.accelerate import accelerated
from specdec.cpu.packed_linear import packing_fault
from specdec.engine.causal_lm import CausalLM
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.hub.load import load_model
from specdec.interfaces import Row
from specdec.records.files import write_json
from specdec.records.provenance import collect
from specdec.tree import TokenTree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def binary_tree(root: int, size: int) -> TokenTree:
    """``size`` nodes, two children each."""
    return TokenTree((root, *range(100, 99 + size)), (-1, *((i - 1) // 2 for i in range(1, size))))


def compiled(model: Any) -> Any:
    """A copy of ``model``, sharing its weights, whose decoder torch.compile runs; it compiles at the first passes."""
    ours = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # the alternative is to run plain layers in silence
    decoder = ours.get_decoder()
    decoder.forward = torch.compile(decoder.forward, dynamic=True)
    return ours


def measure(
    model: Any, context: int, rounds: int, *, compile: bool = False
) -> tuple[dict[str, dict[int, list[float]]], dict[str, float]]:
    """Seconds of each pass, by engine and size, and what each engine took to be made and for a first round."""
    makers: dict[str, Callable[[], Any]] = {"plain": lambda: model, "packed": lambda: accelerated(model)}
    if compile:
        makers["compiled"] = lambda: compiled(model)
    engines, first = {}, {}
    for name, make in makers.items():
        started = time.perf_counter()
        engines[name] = CausalLM(make())
        first[name] = time.perf_counter() - started
    ids = torch.randint(1000, 20000, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {name: Row(0, list(ids), context + 64) for name in engines}
    for name, engine in engines.items():
        started = time.perf_counter()
        engine.open([rows[name]])
        engine.score([rows[name]], [TokenTree.root(ids[-1])])
        first[name] += time.perf_counter() - started
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in engines}
    for number in range(rounds + 1):
        for size in SIZES:
            for name, engine in engines.items():
                started = time.perf_counter()
                engine.score([rows[name]], [binary_tree(ids[-1], size)])
                seconds = time.perf_counter() - started
                if number:
                    times[name][size].append(seconds)
                else:
                    first[name] += seconds
    return times, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model = load_model(given.target, dtype=given.dtype, device="cpu")
    if fault := packing_fault(model.dtype):
        sys.exit(f"error: {fault}")
    times, first = measure(model, given.context, given.rounds, compile=given.compile)
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
        ratios = "  ".join(f"{size}: {entry['ratio']:.2f}" for size, entry in sizes.items())
        print(f"{name} ({first[name]:.0f} s to begin) {ratios}")
    if given.output is not None:
        facts = {"target": model_facts(given.target)}
        settings = {"context": given.context, "rounds": given.rounds}
        provenance = collect(sys.argv, dtype=given.dtype, device="cpu", models=facts, settings=settings)
        write_json(given.output, {"schema": 2, "provenance": provenance, "curves": curves, "first_round_s": first})


if __name__ == "__main__":
    main()
