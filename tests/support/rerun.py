"""A recorder for CPUs, for tests and for dry runs of benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Callable

from specdec.cuda.recording import Output, Recording


class Rerun:
    """Calls the function again: on a CPU that brings nothing but the same path through the code."""

    def record(self, run: Callable[[], Output]) -> Recording[Output]:
        return Recording(run)
