"""Times of alternatives that take turns: medians, quartiles, and ratios with intervals that assume no distribution."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Timed = dict[str, Callable[[], object]]
WARM_ROUNDS = 3


@dataclass
class Run:
    """One call of the script: where it runs, at which sizes, and what it has found."""

    device: str
    is_dry: bool
    rounds: int
    sizes: tuple[str, ...] = ("1b", "8b")  # of inflated models
    rows: list[dict[str, Any]] = field(default_factory=list)
    _rate: float | None = None

    def pick(self, real: Any, toy: Any) -> Any:
        return toy if self.is_dry else real

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_dry else torch.bfloat16

    def add(self, section: str, what: str, **numbers: Any) -> None:
        self.rows.append({"section": section, "what": what, **numbers})
        print(section, what, *(f"{key}={value}" for key, value in numbers.items()), file=sys.stderr)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, section: str, what: str, methods: Timed, **facts: Any) -> dict[str, float]:
        """Medians in microseconds. Methods take turns; one that raises is noted and left out.

        A row's ``ratio`` is what the method takes against the first one, the median over rounds, with ``low`` and
        ``high`` around it at 95 % or more.
        """
        usable: Timed = {}
        for name, method in methods.items():
            try:
                method()
                self.sync()
                usable[name] = method
            except Exception as error:  # other packages' kernels raise what they like
                self.add(section, f"{what}: {name}", noted=f"{type(error).__name__}: {str(error)[:200]}")
        found = self._rounds(usable)
        medians = {name: statistics.median(times) for name, times in found.items()}
        first = next(iter(found), None)
        for name, times in found.items():
            low, high = quartiles(times)
            numbers = {"us": round(medians[name], 2), "q1": round(low, 2), "q3": round(high, 2)}
            if first is not None and name != first:
                numbers |= ratio(times, found[first])
            self.add(section, f"{what}: {name}", **numbers, **facts)
        return medians

    def _rounds(self, methods: Timed) -> dict[str, list[float]]:
        """Microseconds of each round; each begins with another method than the one before."""
        found: dict[str, list[float]] = {name: [] for name in methods}
        names = list(methods)
        warm = 0 if self.is_dry else WARM_ROUNDS
        for number in range(warm + self.rounds):
            start = number % max(len(names), 1)
            for name in names[start:] + names[:start]:
                us = self._once(methods[name])
                if number >= warm:
                    found[name].append(us)
        return found

    def _once(self, method: Callable[[], object]) -> float:
        if self.device != "cuda":
            started = time.perf_counter()
            method()
            return (time.perf_counter() - started) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        method()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def graphed(self, method: Callable[[], object]) -> Callable[[], object]:
        """``method`` as a replayed graph (on a CPU: itself)."""
        from specdec.cuda.recording import CudaGraphs

        return CudaGraphs(torch.device("cuda", 0)).record(method).replay if self.device == "cuda" else method

    def gb_per_s(self) -> float:
        """The rate at which memory is copied, bytes read and written both counted; measured once."""
        if self._rate is None:
            size = self.pick(1 << 30, 1 << 16)
            source = torch.empty(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            times = self._rounds({"copy": lambda: target.copy_(source)})["copy"]
            self._rate = 2 * size / statistics.median(times) / 1e3
        return self._rate


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The median ratio of paired times, and order statistics around it that hold the true median at 95 % or more.

    Fewer than six pairs cannot: then the interval is that of all ratios.
    """
    ratios = sorted(a / b for a, b in zip(times, others, strict=True))
    n, cut, tail = len(ratios), 0, 0.0
    while tail + math.comb(n, cut) / 2**n <= 0.025:
        tail += math.comb(n, cut) / 2**n
        cut += 1
    cut = max(cut - 1, 0)
    found = {"ratio": statistics.median(ratios), "low": ratios[cut], "high": ratios[n - 1 - cut]}
    return {name: round(value, 4) for name, value in found.items()}
