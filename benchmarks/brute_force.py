"""Is the tuned configuration as fast as the best fixed one? Every drafter with every fixed tree size, against the file.

    python benchmarks/brute_force.py --config tuned.json --output benchmarks/tuned-float32.json

All configurations run on each prompt in turn, in rotating order, in one process; ratios are paired by prompt. The
prompts should not be those that were tuned on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec.budget.adaptive import make_budget
from specdec.cli.loading import all_model_facts, eos_ids, load
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.interfaces import Row
from specdec.records.files import write_json
from specdec.records.prompts import BUILTIN, load_prompts, render_turns
from specdec.records.provenance import collect
from specdec.records.tuned import load_tuned
from specdec.sampling import SamplingParams
from specdec.tune.setting import Setting
from specdec.verifiers import make_verifier

Configuration = tuple[str, int, bool]  # drafter, largest tree, adaptive


def ratio(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """Geometric mean of paired ratios of speed, with a 95 % bootstrap interval."""
    logs = np.log(np.asarray(other) / np.asarray(own))
    picks = np.random.default_rng(0).integers(len(logs), size=(2000, len(logs)))
    low, high = np.exp(np.percentile(logs[picks].mean(1), [2.5, 97.5]))
    return [float(np.exp(logs.mean())), float(low), float(high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--target", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", action="append", help="default: ngram, recycling and hybrid")
    parser.add_argument("--sizes", default="4,8,16,32")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", default=BUILTIN)
    parser.add_argument("--first", type=int, default=1, help="take every other prompt from this one on")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    tuned = load_tuned(options.config)
    entry = tuned.nearest(1)
    chosen: Configuration = (entry.drafter, entry.max_nodes, entry.adaptive)
    drafters = options.drafter or ["ngram", "recycling", "hybrid"]
    fixed = [(drafter, int(size), False) for drafter in drafters for size in options.sizes.split(",")]
    names = {"tuned": chosen, **{f"{d} {n} fixed": (d, n, a) for d, n, a in fixed}, "none": ("none", 0, False)}
    loaded = load(options.target, (), options.dtype, "auto")
    setting = Setting(
        loaded.runtime, make_verifier("match"), SamplingParams(0.0), eos_ids(loaded.model), options.max_new_tokens
    )
    prompts = load_prompts(options.prompts)[options.first :: 2]
    prompts = [prompts[i * len(prompts) // options.limit] for i in range(min(options.limit, len(prompts)))]
    decoders = {
        name: setting.decoder(setting.drafter(d), make_budget(n, a, tuned.costs())) for name, (d, n, a) in names.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    texts: dict[str, list[list[int]]] = {name: [] for name in names}
    for number, prompt in enumerate(prompts):
        ids = list(render_turns(loaded.tokenizer, prompt, []))
        order = list(names)[number % len(names) :] + list(names)[: number % len(names)]
        for name in order:
            row = Row(number, list(ids), len(ids) + options.max_new_tokens)
            started = time.perf_counter()
            for _ in decoders[name].run([row]):
                pass
            seconds[name].append((time.perf_counter() - started) / row.num_emitted)
            texts[name].append(row.tokens)
        print(f"{number + 1} of {len(prompts)}", file=sys.stderr, flush=True)
    report(options, names, seconds, texts, loaded)


def report(
    options: argparse.Namespace,
    names: dict[str, Configuration],
    seconds: dict[str, list[float]],
    texts: dict[str, list[list[int]]],
    loaded: Any,
) -> None:
    speed = {name: ratio(each, seconds["none"]) for name, each in seconds.items()}
    best = max((name for name in names if name != "tuned"), key=lambda name: speed[name][0])
    against = ratio(seconds["tuned"], seconds[best])
    same = sum(a == b for a, b in zip(texts["tuned"], texts["none"], strict=True))
    for name, (mean, low, high) in sorted(speed.items(), key=lambda pair: -pair[1][0]):
        print(f"{name:24} {mean:.2f}x [{low:.2f}, {high:.2f}]")
    print(f"tuned / best fixed ({best}): {against[0]:.3f} [{against[1]:.3f}, {against[2]:.3f}]")
    settings = {key: str(value) for key, value in vars(options).items()} | {"num_prompts": len(seconds["none"])}
    provenance = collect(
        [Path(sys.executable).name, *sys.argv],
        dtype=loaded.dtype,
        device=str(loaded.model.device),
        models=all_model_facts(options.target, ()),
        settings=settings,
    )
    write_json(
        options.output,
        {
            "kind": "brute_force",
            "provenance": provenance,
            "configurations": {name: list(each) for name, each in names.items()},
            "speedup_over_plain": speed,
            "best_fixed": best,
            "tuned_over_best_fixed": against,
            "num_identical_to_plain": same,
        },
    )


if __name__ == "__main__":
    main()
