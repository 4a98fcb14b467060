"""Whether weights that were copied elsewhere still hold what they held: exactly where PyTorch counts, else by samples.

Operators that write to a tensor are counted (``_version``). Writes through ``.data`` or a NumPy view are not, so the
contents are sampled as well. The samples of a matrix touch each of its rows and columns. A large model has too many to
read them at every call: then each call reads a part of them, some of each weight, and a later call the next part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

_MOST_SAMPLES = 1 << 14  # of one call: about a millisecond, because each lies in a cache line of its own


class WeightWatch:
    """The weights and biases of ``layers`` as they are now, without keeping them alive.

    What is found at the next call: any change that PyTorch counts, other storage or layout, and uncounted writes that
    change most elements. Uncounted writes to whole rows or columns are found within ``num_parts`` calls; single
    elements that were written uncounted may never be found.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = [ref(layer) for layer in layers]
        tensors = list(_tensors(layers))
        self._facts = [_facts(tensor) for tensor in tensors]
        self._tensors = [ref(tensor) for tensor in tensors]
        steps = [_step(tensor) for tensor in tensors]
        counts = [-(-tensor.numel() // step) for tensor, step in zip(tensors, steps, strict=True)]
        self.num_parts = max(1, -(-sum(counts) // _MOST_SAMPLES))
        self._parts = [
            [_part(count, step, self.num_parts, part) for count, step in zip(counts, steps, strict=True)]
            for part in range(self.num_parts)
        ]
        self._samples = [_sampled(tensors, part) for part in self._parts]
        self._next = 0

    def is_unchanged(self) -> bool:
        layers = [layer() for layer in self._layers]
        if any(layer is None for layer in layers):
            return False
        tensors = list(_tensors(layers))
        if [_facts(tensor) for tensor in tensors] != self._facts:
            return False
        if any(known() is not tensor for known, tensor in zip(self._tensors, tensors, strict=True)):
            return False
        part, self._next = self._next, (self._next + 1) % self.num_parts
        return torch.equal(_sampled(tensors, self._parts[part]), self._samples[part])


def _tensors(layers: Sequence[Any]) -> Iterator[Tensor]:
    for layer in layers:
        yield layer.weight
        bias = layer._parameters.get("bias")
        if bias is not None:
            yield bias


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """What changes with most ways to change a tensor."""
    version = None if tensor.is_inference() else tensor._version
    return type(tensor), version, tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _step(tensor: Tensor) -> int:
    """A step through the elements of a matrix, one after the other, that meets every row and every column."""
    if tensor.dim() != 2:
        return 1
    rows, columns = tensor.shape
    step = min(rows, columns)
    while gcd(step, rows * columns) > 1:
        step -= 1
    return step


def _part(count: int, step: int, num_parts: int, part: int) -> tuple[int, int, int]:
    """Of ``count`` samples every ``num_parts``-th, at least one: how many, the first element and the step."""
    num_parts = min(num_parts, count)
    part %= num_parts
    return -(-(count - part) // num_parts), part * step, num_parts * step


@torch.inference_mode()
def _sampled(tensors: Sequence[Tensor], part: Sequence[tuple[int, int, int]]) -> Tensor:
    """The bytes of the elements ``part`` says of each tensor."""
    found = []
    for tensor, (count, start, step) in zip(tensors, part, strict=True):
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        found.append(whole.as_strided((count,), (step,), whole.storage_offset() + start))
    return torch.cat(found).view(torch.uint8) if found else torch.empty(0, dtype=torch.uint8, device="cpu")
