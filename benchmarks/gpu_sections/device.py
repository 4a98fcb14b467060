"""What the device can do at best, and whether the kernels are right on it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gpu_sections.timing import Run

ROOT = Path(__file__).resolve().parents[2]


def ceilings(run: Run) -> None:
    """What the device can do: bytes copied, and multiplications."""
    run.add("ceilings", "copy rate", gb_per_s=round(run.gb_per_s(), 1))
    n = run.pick(8192, 64)
    a, b = run.randn(n, n), run.randn(n, n)
    us = run.time("ceilings", "product of matrices", {"matmul": lambda: a @ b})["matmul"]
    run.add("ceilings", "product rate", tflop_per_s=round(2 * n**3 / us / 1e6, 2))


def tests(run: Run) -> None:
    """The GPU tests, then the same below compute-sanitizer."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/test_kernels_gpu.py",
    ]
    graphs = "tests/cuda/test_graphs.py::test_graphs_on_a_gpu_equal_ordinary_passes"
    command += ["-k", "moved"] if run.is_dry else [graphs]
    checkers = {
        "plain": [],
        **{t: ["compute-sanitizer", "--tool", t, "--error-exitcode", "9"] for t in ("memcheck", "racecheck")},
    }
    for name, prefix in checkers.items():
        if prefix and (run.is_dry or shutil.which(prefix[0]) is None):
            run.add("tests", name, noted="compute-sanitizer was not found" if not run.is_dry else "needs a GPU")
            continue
        done = subprocess.run([*prefix, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
        run.add("tests", name, status=done.returncode, last=(done.stdout.strip().splitlines() or [""])[-1])
