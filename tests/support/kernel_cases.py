"""What the kernel tests share: the simulator as backend, thread schedules, random trees and their masks."""

from __future__ import annotations

import random
import shutil
import subprocess

import pytest
import simulator
import torch
from torch import Tensor

from specdec.kernels.rng import RngKeys

SCHEDULES = (0, -1, 3, 4)  # one warp as far as it can go, both ways; random warps; random steps
each_schedule = pytest.mark.parametrize("seed", SCHEDULES)


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder of compiled kernels for the whole run."""
    return str(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, kernel_cache: str) -> None:
    """Ops on CPU tensors run their CUDA kernels; without g++ the test is skipped."""
    if reason := simulator.unavailable():
        pytest.skip(f"kernels cannot be simulated: {reason}")
    monkeypatch.setenv("SPECDEC_KERNELS", "sim")
    monkeypatch.setenv("SPECDEC_KERNEL_CACHE", kernel_cache)


def random_parents(num_nodes: int, seed: int, reach: int = 6) -> list[int]:
    """Parents in topological order, each at most ``reach`` nodes back: some branches, some chains."""
    chance = random.Random(seed)
    return [-1, *(chance.randrange(max(0, i - reach), i) for i in range(1, num_nodes))]


def ancestors(parents: list[int]) -> Tensor:
    """(n, n) bool: entry [i, j] says that j is i or above it."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def noise_keys(rows: int, seed: int = 0x9ABCDEF012345678, position: int = 40) -> RngKeys:
    """Different keys for each row; the default seed has its highest bit set."""
    signed = seed - 2**64 if seed >> 63 else seed
    ids = torch.arange(rows)
    return RngKeys(torch.tensor([signed]), ids * 3 + 1, ids * 7 + position)


def nvcc_unavailable() -> str:
    """Why nvcc cannot compile here, or nothing."""
    place = shutil.which("nvcc")
    if place is None or subprocess.run([place, "--version"], capture_output=True, check=False).returncode:
        return "nvcc was not found; install the CUDA toolkit to compile the kernels for GPUs"
    return (
        "" if shutil.which("g++") else "nvcc needs g++, which was not found; install it (Debian: apt-get install g++)"
    )
