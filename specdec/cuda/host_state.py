"""What a recorded pass holds of a model for ever: all that Python read when it was recorded, as values to compare.

Contents of tensors are not among these, because a replay reads them again; where they lie is.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from specdec.engine.hidden_states import is_hook_of_ours

_DEEPEST = 6  # objects below an attribute of a module
_LONGEST = 1000  # entries of a list or a dict; of longer ones only their number is compared
_MOST = 100_000  # objects in all; the others count by their identity
_ATOMS = {type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.Size}
_CONTAINERS = {dict, OrderedDict, list, tuple, set}
# Members of every module that its forward does not read, or that are read in another way.
_SKIPPED = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers"}


def host_state(model: nn.Module) -> Any:
    """Equal for equal modules, addresses of tensors, attributes, hooks and configs of ``model``, as deep as they go.

    What functions read from elsewhere than their own variables and defaults is not seen, nor what objects without a
    ``__dict__`` hold.
    """
    return _Reader().read(model, 0)


class _Reader:
    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # by id, in the order of reading
        self._seen: list[Any] = []  # so that no id is used twice

    def read(self, value: Any, depth: int) -> Any:
        if type(value) in _ATOMS:
            return type(value), value
        if isinstance(value, float):
            return repr(value)  # NaN equals itself, and 0.0 differs from -0.0
        if id(value) in self._numbers:
            return "seen", self._numbers[id(value)]
        self._numbers[id(value)] = len(self._seen)
        self._seen.append(value)
        if isinstance(value, Tensor):
            return _address(value)
        if depth > _DEEPEST or len(self._seen) > _MOST:
            return type(value), id(value)
        if isinstance(value, nn.Module):
            # Its children start anew: a model may be deeper than what hangs on a module.
            members = [(name, member) for name, member in list(vars(value).items()) if name not in _SKIPPED]
            members += [(name, _foreign(getattr(value, name))) for name in ("_forward_hooks", "_forward_pre_hooks")]
            children = [(name, self.read(child, 0)) for name, child in value._modules.items()]
            return type(value), type(value).forward, self._entries(members, depth), children
        return self._of_object(value, depth + 1)

    def _of_object(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return type(value), self._entries(value.items(), depth)
        if isinstance(value, list | tuple | set | frozenset):
            return type(value), self._entries(enumerate(value), depth)
        if isinstance(value, types.FunctionType):
            cells = [_content(cell) for cell in value.__closure__ or ()]
            return value.__code__, self.read([cells, value.__defaults__, value.__kwdefaults__], depth)
        if isinstance(value, types.MethodType):
            return self.read([value.__func__, value.__self__], depth)
        if isinstance(value, functools.partial):
            return self.read([value.func, value.args, value.keywords], depth)
        if isinstance(value, type | types.ModuleType) or not hasattr(value, "__dict__"):
            return type(value), id(value)
        return type(value), self._entries(vars(value).items(), depth)

    def _entries(self, items: Any, depth: int) -> Any:
        entries = list(items)
        if len(entries) > _LONGEST:
            return len(entries)
        found: list[Any] = []
        for key, entry in entries:
            key = key if type(key) in _ATOMS else id(key)
            if type(entry) in _ATOMS:
                found += (key, type(entry), entry)
            elif type(entry) in _CONTAINERS and not entry:
                found += (key, type(entry))
            else:
                found += (key, self.read(entry, depth))
        return found


def _foreign(hooks: dict[int, Any]) -> dict[int, Any]:
    return {number: hook for number, hook in list(hooks.items()) if not is_hook_of_ours(hook)}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _address(tensor: Tensor) -> Any:
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return type(tensor), id(tensor)
    return type(tensor), tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
