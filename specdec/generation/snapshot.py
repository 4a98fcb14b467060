"""What an object of the caller's keeps, so that a call can be seen to change it.

Everything that can be reached from the object by attributes, slots, containers, closures and data of its classes is
looked at. What lies outside of that (global variables, files) is not seen; what lies inside but cannot be read, such as
an object of an extension module, makes the whole state unreadable.
"""

from __future__ import annotations

import functools
import logging
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from types import BuiltinMethodType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_ENTRIES = 20_000
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice, range)
# Never part of what a call changes, though one may hang on to them.
_FIXED = (type, ModuleType, Enum, logging.Logger, property, classmethod, staticmethod)
_CONTAINERS = (list, tuple, deque, dict, OrderedDict, defaultdict, set, frozenset)
_FOREIGN = ("builtins", "abc", "typing", "collections", "torch", "transformers")  # classes whose data are constants


class UnreadableStateError(Exception):
    """A part of an object cannot be looked at, or it is too large."""


class Snapshot:
    """The state of ``thing`` at one moment.

    Raises:
        UnreadableStateError: a part of it cannot be looked at; the message names its class.
    """

    def __init__(self, thing: Any) -> None:
        self._entries: list[tuple[Any, Any]] = []  # what must be the same object, and what must be equal
        # By id, with the entry; what was seen is kept alive, so that nothing else can take its place in memory.
        self._seen: dict[int, tuple[int, Any]] = {}
        self._visit(thing)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot) or len(self._entries) != len(other._entries):
            return False
        pairs = zip(self._entries, other._entries, strict=True)
        return all(a is b and seen_a == seen_b for (a, seen_a), (b, seen_b) in pairs)

    __hash__ = None  # type: ignore[assignment]

    def _add(self, same: Any, equal: Any = None) -> None:
        if len(self._entries) >= _MAX_ENTRIES:
            raise UnreadableStateError(f"more than {_MAX_ENTRIES} parts")
        self._entries.append((same, equal))

    def _visit(self, thing: Any) -> None:
        if thing is None or isinstance(thing, _VALUES):
            self._add(type(thing), repr(thing) if isinstance(thing, float | complex) else thing)
            return
        if isinstance(thing, _FIXED):
            self._add(thing)
            return
        if id(thing) in self._seen:
            self._add(None, self._seen[id(thing)][0])
            return
        self._seen[id(thing)] = len(self._entries), thing
        if not (self._visit_array(thing) or self._visit_callable(thing)):
            self._visit_object(thing)

    def _visit_array(self, thing: Any) -> bool:
        """Numbers, and what makes them."""
        if isinstance(thing, Tensor):
            self._add(thing, thing.cpu().flatten().tolist() if thing.is_inference() else thing._version)
        elif isinstance(thing, np.ndarray | np.generic):
            self._add(type(thing), (thing.shape, thing.dtype, thing.tobytes()))
        elif isinstance(thing, torch.Generator):
            self._add(thing, thing.get_state().tolist())
        elif isinstance(thing, random.Random):
            self._add(thing, thing.getstate())
        elif isinstance(thing, np.random.Generator):
            self._add(thing, repr(thing.bit_generator.state))
        else:
            return False
        return True

    def _visit_callable(self, thing: Any) -> bool:
        parts: list[Any]
        if isinstance(thing, MethodType):
            parts = [thing.__func__, thing.__self__]
        elif isinstance(thing, functools.partial):
            parts = [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, BuiltinMethodType):
            parts = [thing.__name__, thing.__self__]
        elif isinstance(thing, FunctionType):
            cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
            parts = [thing.__code__.co_name, cells, thing.__defaults__, thing.__kwdefaults__, vars(thing)]
        else:
            return False
        self._add(getattr(thing, "__code__", type(thing)))
        for part in parts:
            self._visit(part)
        return True

    def _visit_object(self, thing: Any) -> None:
        """An instance of a class that was written in Python, or a container."""
        kind = type(thing)
        if not (kind in _CONTAINERS or _is_python(kind)):
            raise UnreadableStateError(f"a {kind.__module__}.{kind.__qualname__}")
        self._add(kind, len(thing) if isinstance(thing, _CONTAINERS) else None)
        if isinstance(thing, dict):
            for key, value in thing.items():
                self._visit(key)
                self._visit(value)
        elif isinstance(thing, set | frozenset):
            self._add(None, frozenset(thing))
        elif isinstance(thing, list | tuple | deque):
            for value in thing:
                self._visit(value)
        for name, value in (getattr(thing, "__dict__", None) or {}).items():
            self._add(None, name)
            self._visit(value)
        for base in kind.__mro__:
            self._visit_class(thing, base)

    def _visit_class(self, thing: Any, base: type) -> None:
        """What ``base`` adds to an instance: its slots, and data that all instances share."""
        if base.__module__.split(".")[0] in _FOREIGN:
            return
        for name, value in vars(base).items():
            if isinstance(value, MemberDescriptorType):
                self._visit(getattr(thing, name, None))
            elif not name.startswith(("__", "_abc_")) and isinstance(value, (*_VALUES, *_CONTAINERS, Tensor)):
                self._add(None, name)
                self._visit(value)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_python(kind: type) -> bool:
    """Whether instances of ``kind`` hold nothing beside their dict, slots and what a container holds.

    Classes of extension modules look the same from outside, but their instances are larger.
    """
    base = next((each for each in kind.__mro__ if each in _CONTAINERS), object)
    slots = sum(
        isinstance(value, MemberDescriptorType)
        for each in kind.__mro__
        if "__slots__" in vars(each)
        for value in vars(each).values()
    )
    pointer = object.__basicsize__ // 2
    pointers = slots + (kind.__dictoffset__ > base.__dictoffset__) + (kind.__weakrefoffset__ > base.__weakrefoffset__)
    is_heap = bool(kind.__flags__ & (1 << 9))
    return is_heap and kind.__basicsize__ <= base.__basicsize__ + pointer * pointers


def changes(thing: Any, call: Callable[[], Any]) -> tuple[Any, bool]:
    """What ``call`` returns, and whether it changed ``thing``.

    Raises:
        UnreadableStateError: that cannot be told, before the call or after it.
    """
    before = Snapshot(thing)
    answer = call()
    return answer, Snapshot(thing) != before


def is_plain(parts: Any) -> bool:
    """Whether ``parts`` are numbers, texts, tensors and containers of these."""
    if isinstance(parts, Mapping):
        return all(is_plain(part) for pair in parts.items() for part in pair)
    if isinstance(parts, list | tuple | set | frozenset):
        return all(map(is_plain, parts))
    return parts is None or isinstance(parts, (*_VALUES, Tensor, torch.Generator))
