"""A recorder as strict as a CUDA graph, on a CPU: it keeps every operation with its addresses and Python numbers.

A replay runs the operations, not the function, so a number that the function took from the host stays as it was; an
operation that would wait for a device is refused. Launches of simulated kernels are kept, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import simulator
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from specdec.cuda.recording import Output, Recording

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal}
INDEXED = {aten.index, aten.index_put, aten.index_put_}  # with a bool tensor they count first


@dataclass
class Operation:
    run: Callable[[], Any]
    made: dict[int, Tensor]  # place among its outputs -> one that it allocated, not a view or written in place

    def replay(self) -> None:
        outputs = tensors(self.run())
        for place, tensor in self.made.items():
            tensor.copy_(outputs[place])


@dataclass
class Tape:
    """A Recorder; a replay spoils what the other recordings of the tape made, as a shared pool of memory may."""

    recordings: list[list[Operation]] = field(default_factory=list)

    def record(self, run: Callable[[], Output]) -> Recording[Output]:
        run()
        operations: list[Operation] = []
        with Taping(operations):
            output = run()
        self.recordings.append(operations)

        @torch.no_grad()
        def replay() -> Output:
            for other in self.recordings:
                if other is not operations:
                    spoil(other)
            for operation in operations:
                operation.replay()
            return output

        return Recording(replay, 1, 1.0)


class Taping(TorchDispatchMode):
    active: Taping | None = None

    def __init__(self, operations: list[Operation]) -> None:
        super().__init__()
        self.operations = operations

    def __enter__(self) -> Taping:
        Taping.active = self
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        Taping.active = None
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counts = func.overloadpacket in INDEXED and any(t.dtype is torch.bool for t in tensors(args[1]))
        if func.overloadpacket in WAITS or counts:
            raise RuntimeError(f"{func} would wait for the device")
        output = func(*args, **kwargs)
        given = {storage(t) for t in tensors((args, kwargs))}
        made = {i: t for i, t in enumerate(tensors(output)) if storage(t) not in given}
        self.operations.append(Operation(lambda: func(*args, **kwargs), made))
        return output


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def spoil(operations: list[Operation]) -> None:
    for operation in operations:
        for tensor in operation.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


@pytest.fixture
def taped_kernels(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops run their simulated kernels, and a tape hears of the launches, which are no operations of torch."""
    load = simulator.Simulator.load

    def loud(self: Any, file: str, expressions: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple(told(kernel) for kernel in load(self, file, expressions))

    monkeypatch.setattr(simulator.Simulator, "load", loud)


def told(kernel: Any) -> Any:
    def launch(*args: Any) -> None:
        with _disable_current_modes():  # the simulator looks behind its outputs
            kernel(*args)
        if Taping.active:
            Taping.active.operations.append(Operation(lambda: kernel(*args), {}))

    return launch
