"""The kernels under g++'s sanitizers: bad addresses, undefined behaviour, races between the threads of a block.

Each run is a process of its own, because the sanitizer's library must be loaded first. A planted fault that leaves
every value right shows that the sanitizer is looking.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import kernel_probes
import pytest
import simulator
from kernel_cases import kernel_cache, simulated  # noqa: F401
from kernel_probes import PROBES

from specdec.kernels import source

pytestmark = pytest.mark.usefixtures("simulated")
SUPPORT = Path(kernel_probes.__file__).resolve().parent
FLAGS = {
    "asan": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "tsan": "-O1 -g1 -fsanitize=thread",
}
MARKS = ("AddressSanitizer", "ThreadSanitizer", "runtime error")


def run(kind: str, probes: tuple[str, ...], cache: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    library = subprocess.run(
        ["g++", f"-print-file-name=lib{kind}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip(f"g++ has no lib{kind}.so here")
    environment = os.environ | {
        "LD_PRELOAD": library,
        "SPECDEC_SIM_FLAGS": FLAGS[kind],
        "SPECDEC_KERNELS": "sim",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")])),
        "SPECDEC_KERNEL_CACHE": cache,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SUPPORT / "kernel_probes.py"), *probes]
    if folder is not None:
        command = [sys.executable, "-P", "-c", _ELSEWHERE.format(str(folder)), *probes]
    if kind == "tsan":
        fixed = shutil.which("setarch") and subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False)
        if not fixed or fixed.returncode:
            pytest.skip("the race checker needs fixed addresses, and setarch -R (Debian: util-linux) does not run here")
        command = ["setarch", "-R", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)


_ELSEWHERE = """
import sys
from pathlib import Path
from specdec.kernels import source
source.CUDA = Path({0!r})
import kernel_probes
for name in sys.argv[1:]:
    kernel_probes.run(name, (0,))
"""


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in a file; every value stays right, so only ``message`` shows it."""

    kind: str
    probe: str
    file: str
    old: str
    new: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.probe}"


PLANTED = [
    # Rows behind the last one are read and never used.
    Fault(
        "asan",
        "attention_f32",
        "attention.cu",
        "const int r = min(first_row + i / D, rows - 1);",
        "const int r = first_row + i / D;",
        "heap-buffer-overflow",
    ),
    # The shift is taken modulo the width by every processor in question.
    Fault(
        "asan",
        "attention_f32",
        "attention.cuh",
        "bits[node >> 6] >> (node & 63)",
        "bits[node >> 6] >> node",
        "runtime error: shift exponent",
    ),
    # One thread writes what all others read next; in this schedule it happens to be the first to go on.
    Fault(
        "tsan",
        "reject",
        "reject.cu",
        "done.scale[rejected] = left > 0.0f ? 1.0f / left : 0.0f;\n      __syncthreads();",
        "done.scale[rejected] = left > 0.0f ? 1.0f / left : 0.0f;",
        "data race",
    ),
]


# What one process runs; two processes share the cores.
SHARES = [
    ("attention_mma", "walk", "reject", "reject_on_equality", "commit"),
    ("attention_f32", "pick"),
]
CLEAN = [(kind, share) for kind in FLAGS for share in SHARES]
Done = Future[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, kernel_cache: str) -> Iterator[dict[object, Done]]:  # noqa: F811
    """All runs, two at a time."""
    if reason := simulator.unavailable():
        pytest.skip(f"kernels cannot be simulated: {reason}")
    place = tmp_path_factory.mktemp("planted")
    with ThreadPoolExecutor(2) as pool:
        clean = {case: pool.submit(run, *case, kernel_cache) for case in CLEAN}
        yield clean | {
            fault: pool.submit(run_planted, fault, place / str(i), kernel_cache) for i, fault in enumerate(PLANTED)
        }


def run_planted(fault: Fault, folder: Path, cache: str) -> subprocess.CompletedProcess[str]:
    shutil.copytree(source.CUDA, folder)
    text = (folder / fault.file).read_text()
    assert fault.old in text, "the kernel has changed: the text to plant a fault in is not there any more"
    (folder / fault.file).write_text(text.replace(fault.old, fault.new, 1))
    return run(fault.kind, (fault.probe,), cache, folder)


@pytest.mark.parametrize(("kind", "share"), CLEAN, ids=str)
def test_sanitizers_find_nothing(kind: str, share: tuple[str, ...], results: dict[object, Done]) -> None:
    done = results[kind, share].result()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"ran {name}" for name in share]
    assert not any(mark in done.stderr for mark in MARKS), done.stderr[:3000]


def test_every_probe_is_in_a_share() -> None:
    assert sorted(PROBES) == sorted(name for share in SHARES for name in share)


@pytest.mark.parametrize("fault", PLANTED, ids=str)
def test_sanitizers_find_what_is_planted(fault: Fault, results: dict[object, Done]) -> None:
    done = results[fault].result()
    assert done.returncode != 0
    assert fault.message in done.stderr, done.stderr[-3000:]


def test_the_portable_switch_of_fibers_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors without our assembly use ucontext."""
    monkeypatch.setenv("SPECDEC_SIM_FLAGS", "-O1 -DSIMT_UCONTEXT")
    assert simulator.flags() == ("-O1", "-DSIMT_UCONTEXT")
    for name in ("walk", "pick"):
        PROBES[name]()
