"""Work that is recorded once and replayed on the same buffers, as a CUDA graph.

What is recorded may change between replays only through tensors at fixed addresses: a graph holds every address and
every Python number as they were. It must not wait for the device either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

Output = TypeVar("Output")
_WARM_UPS = 2  # lazy initialisations (cuBLAS, NVRTC) are over after the first; the second finds none left


@dataclass(frozen=True, slots=True)
class Recording(Generic[Output]):
    """``replay`` runs the work again; what it returns is overwritten by the next replay of its recorder."""

    replay: Callable[[], Output]
    num_bytes: int = 0  # by which the recorder's memory grew
    seconds: float = 0.0


class Recorder(Protocol):
    """Makes recordings that share memory, so that they must be replayed one after the other."""

    def record(self, run: Callable[[], Output]) -> Recording[Output]:
        """``run`` as a recording; it may run a few times meanwhile, and must do the same each time.

        Raises:
            RuntimeError: it cannot be recorded.
        """


class CudaGraphs:
    """CUDA graphs on ``device`` that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Output]) -> Recording[Output]:
        started = time.perf_counter()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            before = self._reserved()
            graph = torch.cuda.CUDAGraph()
            capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
            with capture:
                output = run()
            num_bytes = self._reserved() - before

        def replay() -> Output:
            graph.replay()
            return output

        return Recording(replay, num_bytes, time.perf_counter() - started)

    def _reserved(self) -> int:
        """Bytes that PyTorch holds, without what it could give back."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()
