"""Makes the results of docs/workloads.md, and their figures.

    python benchmarks/workloads.py           # all; about an hour on two cores that do nothing else
    python benchmarks/workloads.py ragged    # only those named
    python benchmarks/workloads.py figures   # only the figures, in docs/figures
    python benchmarks/workloads.py list      # only print the commands

Needs the console script ``specdec`` beside this interpreter.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "docs/figures"
OURS = "--drafter none --drafter hybrid"
COMMANDS = {
    "ragged": "--workload ragged:n=200 --engine paged --drafter hybrid --max-rows 16 --max-new-tokens 64 --kv-memory 1GB",
    "prefix": f"--workload prefix:n=32,tokens=1000 --engine paged --engine paged:prefix_sharing=false {OURS} --max-rows 8 "
    "--max-new-tokens 32 --kv-memory 1GB --repeats 3",
    "throughput": f"--workload ragged:n=32 --engine paged --engine hf --engine hf-batch {OURS} --max-rows 1 --max-rows 4 "
    "--max-rows 16 --max-new-tokens 64 --kv-memory 1GB --repeats 3",
    "chat": "--workload chat:n=16 --engine paged --engine ragged --engine hf --engine hf-batch --drafter hybrid --max-rows 8 "
    "--max-new-tokens 64 --kv-memory 1GB --repeats 3",
    "poisson": "--workload poisson:0.5,n=32 --engine paged --engine hf --engine hf-batch --drafter hybrid --max-rows 8 "
    "--max-new-tokens 64 --kv-memory 1GB --repeats 3",
}
# Each figure is drawn from the first of these that holds what it shows.
DRAWN = ("ragged", "prefix", "throughput")


def result(name: str) -> str:
    """Where a result is written, from the root of the checkout."""
    return f"benchmarks/workload-{name}.json"


def bench(name: str) -> list[str]:
    """The words of the command that makes a result."""
    return ["bench", *shlex.split(COMMANDS[name]), "--output", result(name)]


def figures() -> list[list[str]]:
    """The words of the commands that draw: throughput from the run made for it, the others from the first that can."""
    of_throughput = ["throughput_comparison", "performance_comparison"]
    words = ["figures", "--out", FOLDER, "--format", "svg"]
    drawn = [name for name in DRAWN if (ROOT / result(name)).exists()]
    commands = [[*words, *(word for name in drawn for word in ("--workload", result(name)))]] if drawn else []
    if "throughput" in drawn:
        only = [word for name in of_throughput for word in ("--only", name)]
        commands.append([*words, "--workload", result("throughput"), *only])
    return commands


def main(arguments: Sequence[str]) -> None:
    """Run what is named."""
    if list(arguments) == ["list"]:
        for name in COMMANDS:
            print(shlex.join(["specdec", *bench(name)]))
        return
    names = [name for name in arguments if name != "figures"] if arguments else list(COMMANDS)
    if unknown := [name for name in names if name not in COMMANDS]:
        sys.exit(f"there is no result {unknown[0]!r}; there are {', '.join(COMMANDS)}, figures and list")
    program = str(Path(sys.executable).with_name("specdec"))
    for name in names:
        print("specdec", *bench(name), flush=True)
        subprocess.run([program, *bench(name)], cwd=ROOT, check=True)
    for words in figures():
        subprocess.run([program, *words], cwd=ROOT, check=True)
    for dark in (ROOT / FOLDER).glob("*-dark.svg"):  # the pages show the light ones
        dark.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
