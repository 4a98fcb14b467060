"""Which backend runs an op: CuPy's kernels, or the torch twin.

``SPECDEC_KERNELS`` is ``auto`` (the default: kernels for CUDA tensors where they can run, else torch), ``torch`` or
``cupy``, or the name of a backend that was registered. A backend that is asked for by name and cannot run raises;
``auto`` never does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch

from specdec.kernels import gpu
from specdec.kernels.errors import KernelUnavailableError
from specdec.kernels.launch import Backend

MODES = ("auto", "torch", "cupy")
VARIABLE = "SPECDEC_KERNELS"
_log = logging.getLogger("specdec.kernels")


class _Registered(NamedTuple):
    backend: Backend
    unavailable: Callable[[torch.device], str]


_registered: dict[str, _Registered] = {}


def register_backend(name: str, backend: Backend, unavailable: Callable[[torch.device], str]) -> None:
    """Let ``SPECDEC_KERNELS=name`` run every op on ``backend``; a name that is registered already is replaced.

    ``unavailable`` says why the backend cannot run on tensors of a device, or nothing.

    Raises:
        ValueError: ``name`` is one of ``MODES``.
    """
    if name in MODES:
        raise ValueError(f"the kernel backend {name!r} is built in; register another name than {', '.join(MODES)}")
    _registered[name] = _Registered(backend, unavailable)


def mode() -> str:
    """The value of ``SPECDEC_KERNELS``.

    Raises:
        ValueError: it is neither one of ``MODES`` nor a registered backend.
    """
    value = os.environ.get(VARIABLE) or "auto"
    known = (*MODES, *_registered)
    if value not in known:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(known)}, got {value!r}")
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
    named = _registered.get(wanted)
    reason = unsupported or (named.unavailable if named else gpu.device_unavailable)(device)
    if reason and wanted != "auto":
        raise KernelUnavailableError(f"{VARIABLE}={wanted}, but the kernel {op} cannot run: {reason}")
    if named:
        return named.backend
    _tell(op, device.type, reason)
    return None if reason else gpu.CupyBackend(torch.cuda.current_device() if device.index is None else device.index)


def is_wanted(op: str, device: torch.device) -> bool:
    """Whether ``op`` should do what can be done without it, too: a backend was asked for by name, and runs it.

    Not yet by itself where kernels can run: no GPU has seen it (docs/gpu-todo.md).

    Raises:
        KernelUnavailableError: a backend was asked for by name and cannot run.
    """
    return mode() == "torch" or (mode() != "auto" and choose(op, device) is not None)


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
    if wanted in _registered:
        return
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    else:
        reason = gpu.device_unavailable(torch.device("cuda", torch.cuda.current_device()))
    if wanted == "torch":
        reason = "asked for"
    yield f"on a GPU: torch ({reason})" if reason else "on a GPU: cupy"
    yield "on a CPU: torch"
