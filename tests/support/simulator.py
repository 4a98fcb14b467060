"""Backend ``sim``: the ``.cu`` files compiled by g++ through ``sim/*.h`` beside this file and run on CPU tensors.

For tests, not for speed: every kernel, launcher and grid can be checked where there is no GPU. Importing this module
registers the backend, which ``SPECDEC_KERNELS=sim`` then chooses. The thread schedule is an argument (see
``sim/schedule.h``); outputs start poisoned and end in guard bytes that no kernel may touch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import source
from specdec.kernels.dispatch import register_backend
from specdec.kernels.errors import KernelUnavailableError
from specdec.kernels.launch import Argument, Kernel

SIM = Path(__file__).resolve().parent / "sim"
_HEADERS = ("machine.h", "schedule.h", "cuda.h", "ptx.h")
_GUARD = 64  # bytes behind each output
_POISON = 0xFF  # NaN as a float, -1 as an integer
_schedule: ContextVar[int] = ContextVar("schedule", default=0)


class KernelFaultError(RuntimeError):
    """A kernel did what no kernel may: a deadlock, a lost copy, a store outside its output."""


def unavailable() -> str:
    """Why the simulator cannot run here, or nothing."""
    return "" if shutil.which("g++") else "g++ was not found; install it (Debian: apt-get install g++)"


def device_unavailable(device: torch.device) -> str:
    """Why the simulator cannot run kernels on tensors of ``device``, or nothing."""
    return unavailable() if device.type == "cpu" else f"the tensors are on {device}, not on the CPU"


def cache_dir() -> Path:
    """``$SPECDEC_KERNEL_CACHE``, else the folder ``kernels`` in the user's cache directory of specdec."""
    if own := os.environ.get("SPECDEC_KERNEL_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("SPECDEC_CACHE"):
        return Path(shared).expanduser().absolute() / "kernels"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "specdec" / "kernels"


def flags() -> tuple[str, ...]:
    """``$SPECDEC_SIM_FLAGS`` (sanitizers, optimisation), else -O1 with the processor's 16-bit float conversions."""
    if own := os.environ.get("SPECDEC_SIM_FLAGS"):
        return tuple(own.split())
    return ("-O1", "-mf16c") if _has_f16c() else ("-O1",)


@lru_cache(maxsize=1)
def _has_f16c() -> bool:
    try:
        return " f16c " in Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return False


@contextmanager
def schedule(seed: int) -> Iterator[None]:
    """Run kernels inside the block under thread schedule ``seed`` (0, -1: extreme skew; others: random)."""
    token = _schedule.set(seed)
    try:
        yield
    finally:
        _schedule.reset(token)


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Simulator:
    """See the module's text."""

    name: str = "sim"
    _guards: list[tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=list)

    def load(self, file: str, expressions: tuple[str, ...]) -> tuple[Kernel, ...]:
        if reason := unavailable():
            raise KernelUnavailableError(f"kernels cannot be simulated: {reason}")
        functions = _compiled(source.flattened(file, source.CUDA), expressions, flags(), cache_dir())
        return tuple(self._kernel(function) for function in functions)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((size + _GUARD,), _POISON, dtype=torch.uint8, device=device)
        tensor = buffer[:size].view(dtype).view(*shape) if size else torch.empty(tuple(shape), dtype=dtype)
        self._guards.append((weakref.ref(tensor), buffer[size:]))
        return tensor

    def _kernel(self, function: Callable[..., bytes | None]) -> Kernel:
        def run(grid: tuple[int, ...], block: int, args: Sequence[Argument], shared_bytes: int = 0) -> None:
            config = _LaunchConfig(shared_bytes=shared_bytes, seed=_schedule.get())
            config.grid[:] = (*grid, 1, 1)[:3]
            config.block[:] = (block, 1, 1)
            values = [ctypes.create_string_buffer(_raw(arg)) for arg in args]
            pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            if fault := function(ctypes.byref(config), pointers):
                raise KernelFaultError(fault.decode())
            self._check_guards()

        return run

    def _check_guards(self) -> None:
        self._guards[:] = [guard for guard in self._guards if guard[0]() is not None]
        if any(bool((guard != _POISON).any()) for _, guard in self._guards):
            raise KernelFaultError("a kernel stored past the end of an output")


def _raw(arg: Argument) -> bytes:
    if arg is None or isinstance(arg, Tensor):
        return (arg.data_ptr() if arg is not None else 0).to_bytes(8, "little")
    return np.asarray(arg).tobytes()


@cache
def _compiled(
    text: str, expressions: tuple[str, ...], options: tuple[str, ...], folder: Path
) -> tuple[Callable[..., bytes | None], ...]:
    exports = "".join(f"SIMT_EXPORT(kernel_{i}, ({e}))\n" for i, e in enumerate(expressions))
    program = f'#include "ptx.h"\nnamespace {{\n{text}}}\n#line 1 "exports"\n{exports}'
    headers = "".join((SIM / header).read_text("utf-8") for header in _HEADERS)
    key = hashlib.sha256("\0".join((_compiler_version(), *options, headers, program)).encode()).hexdigest()[:24]
    library = folder / f"{key}.so"
    if not library.exists():
        _compile(program, options, library)
    loaded = ctypes.CDLL(str(library))
    functions = tuple(loaded[f"kernel_{i}"] for i in range(len(expressions)))
    for function in functions:
        function.restype = ctypes.c_char_p
    return functions


def _compile(program: str, options: tuple[str, ...], library: Path) -> None:
    """Compile into a scratch folder and move the result, so that nobody ever loads half a file."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        text, built = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
        text.write_text(program, "utf-8")
        command = ["g++", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off"]
        command += [f"-I{SIM}", *options, "-o", str(built), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise KernelUnavailableError(f"g++ does not compile the kernels:\n{done.stderr[-2000:]}")
        os.replace(built, library)


@lru_cache(maxsize=1)
def _compiler_version() -> str:
    told = subprocess.run(["g++", "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, check=False)
    return told.stdout


SIMULATOR = Simulator()
register_backend("sim", SIMULATOR, device_unavailable)
