"""What a backend is to an op: it turns a ``.cu`` file into kernels that take a grid, a block size and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# A tensor passes its address, None a null pointer, a numpy scalar (or an array of one struct) itself.
Argument = Tensor | np.generic | np.ndarray[Any, Any] | None

C_TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


class Kernel(Protocol):
    """One instantiated kernel."""

    def __call__(self, grid: tuple[int, ...], block: int, args: Sequence[Argument], shared_bytes: int = 0) -> None: ...


class Backend(Protocol):
    """A way to run kernels: ``cupy`` on a GPU, or one that was registered (``dispatch.register_backend``)."""

    @property
    def name(self) -> str: ...

    def load(self, file: str, expressions: tuple[str, ...]) -> tuple[Kernel, ...]:
        """The kernels named by C++ ``expressions`` (such as ``pick_rows<float>``) of ``kernels/cuda/<file>``."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised output or workspace tensor."""


def int32(value: int) -> np.int32:
    return np.int32(value)


def int64(value: int) -> np.int64:
    return np.int64(value)


def float32(value: float) -> np.float32:
    return np.float32(value)


def require(
    name: str, tensor: Tensor, dtype: torch.dtype | Sequence[torch.dtype], shape: Sequence[int | None], like: Tensor
) -> None:
    """Check an argument; ``None`` in ``shape`` is any size, ``like`` gives the device.

    Raises:
        ValueError: another dtype, shape or device, or a tensor with gaps.
    """
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    wanted = tuple("any" if size is None else size for size in shape)
    if tensor.dim() != len(wanted) or any(
        want not in ("any", size) for want, size in zip(wanted, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other arguments, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call .contiguous() on it")
