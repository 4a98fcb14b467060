"""Which backend runs an op: CuPy's kernels, the simulator, or the torch twin.

``SPECDEC_KERNELS`` is ``auto`` (the default: kernels for CUDA tensors where they can run, else torch), ``torch``,
``cupy`` or ``sim``. A backend that is asked for by name and cannot run raises; ``auto`` never does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache

import torch

from specdec.kernels import gpu, simulator
from specdec.kernels.errors import KernelUnavailableError
from specdec.kernels.launch import Backend

MODES = ("auto", "torch", "cupy", "sim")
VARIABLE = "SPECDEC_KERNELS"
_log = logging.getLogger("specdec.kernels")


def mode() -> str:
    """The value of ``SPECDEC_KERNELS``.

    Raises:
        ValueError: it is none of ``MODES``.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {value!r}")
    return value


def choose(op: str, device: torch.device, unsupported: str = "") -> Backend | None:
    """The backend for ``op`` on tensors of ``device``; None is the torch twin.

    ``unsupported`` says why the kernel has no instance for these arguments, if so.

    Raises:
        KernelUnavailableError: a backend was asked for by name and cannot run.
    """
    wanted = mode()
    if wanted == "torch":
        return None
    if wanted == "sim":
        reason = unsupported or _sim_unavailable(device)
        if reason:
            raise KernelUnavailableError(f"{VARIABLE}=sim, but {op} cannot be simulated: {reason}")
        return simulator.SIMULATOR
    reason = unsupported or gpu.device_unavailable(device)
    if reason and wanted == "cupy":
        raise KernelUnavailableError(f"{VARIABLE}=cupy, but the kernel {op} cannot run: {reason}")
    _tell(op, device.type, reason)
    return None if reason else gpu.CupyBackend(torch.cuda.current_device() if device.index is None else device.index)


def is_wanted(op: str, device: torch.device) -> bool:
    """Whether ``op`` should do what can be done without it, too: a backend was asked for by name, and runs it.

    Not yet by itself where kernels can run: no GPU has seen it (docs/gpu-todo.md).

    Raises:
        KernelUnavailableError: a backend was asked for by name and cannot run.
    """
    return mode() == "torch" or (mode() != "auto" and choose(op, device) is not None)


def _sim_unavailable(device: torch.device) -> str:
    return simulator.unavailable() if device.type == "cpu" else f"the tensors are on {device}, not on the CPU"


@cache
def _tell(op: str, device: str, reason: str) -> None:
    """Log each choice once."""
    if reason:
        _log.info("%s on %s: torch (%s)", op, device, reason)
    else:
        _log.info("%s on %s: cupy", op, device)


def describe() -> Iterator[str]:
    """What would run where, one line each, for people."""
    try:
        wanted = mode()
    except ValueError as error:
        yield str(error)
        return
    yield f"{VARIABLE}: {wanted}"
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    else:
        reason = gpu.device_unavailable(torch.device("cuda", torch.cuda.current_device()))
    if wanted == "torch":
        reason = "asked for"
    yield f"on a GPU: torch ({reason})" if reason else "on a GPU: cupy"
    lacking = simulator.unavailable()
    yield f"on a CPU: {'sim' if wanted == 'sim' else 'torch'}; simulator for tests: {lacking or 'ready'}"
