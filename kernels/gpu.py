"""Backend ``cupy``: the ``.cu`` files compiled by NVRTC through CuPy and launched on torch's own stream.

Only pointers cross the border: no CuPy arrays and no CuPy memory. CuPy is imported at the first question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import source
from specdec.kernels.launch import Argument, Kernel

MIN_CAPABILITY = (8, 0)  # mma.m16n8k16, cp.async
_STATIC_SHARED = 48 * 1024  # bytes of dynamic shared memory that need no permission


@lru_cache(maxsize=1)
def cupy_unavailable() -> str:
    """Why CuPy cannot compile and run kernels here, or nothing."""
    try:
        import cupy
    except Exception as error:  # a broken installation raises what it likes
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        how = 'CuPy is not installed; pip install "specdec-toolkit[cuda]"'
        return how if missing else f"CuPy cannot be imported ({type(error).__name__}: {error})"
    try:
        if not cupy.is_available():
            return "CuPy sees no CUDA device or driver"
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # NVRTC not found, driver too old
        return f"CuPy cannot compile here ({type(error).__name__}: {error})"
    return ""


def device_unavailable(device: torch.device) -> str:
    """Why kernels cannot run on ``device``, or nothing."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return cupy_unavailable()


@dataclass(frozen=True, slots=True)
class _Stream:
    """What CuPy's launch wants of a stream."""

    ptr: int


@dataclass(frozen=True, slots=True)
class CupyBackend:
    """See the module's text; one for each device."""

    index: int
    name: str = "cupy"

    def load(self, file: str, expressions: tuple[str, ...]) -> tuple[Kernel, ...]:
        return _kernels(source.flattened(file, source.CUDA), expressions, self.index)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)


@cache
def _kernels(text: str, expressions: tuple[str, ...], device: int) -> tuple[Kernel, ...]:
    import cupy

    module = cupy.RawModule(code=text, options=("-std=c++17",), name_expressions=expressions)
    with torch.cuda.device(device):
        return tuple(_kernel(module.get_function(expression), device) for expression in expressions)


def _kernel(function: Any, device: int) -> Kernel:
    allowed = _STATIC_SHARED

    def run(grid: tuple[int, ...], block: int, args: Sequence[Argument], shared_bytes: int = 0) -> None:
        nonlocal allowed
        values = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
        with torch.cuda.device(device):
            if shared_bytes > allowed:
                function.max_dynamic_shared_size_bytes = allowed = shared_bytes
            # The stream is asked for at every launch: a graph is captured on a side stream.
            stream = _Stream(torch.cuda.current_stream().cuda_stream)
            function((*grid, 1, 1)[:3], (block, 1, 1), values, shared_mem=shared_bytes, stream=stream)

    return run
