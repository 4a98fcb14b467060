"""What is kept beside one model object for as long as it lives, so that the next call starts where the last one ended.

It hangs on the model itself: a copy that is kept shares hooks and attributes, and through them may hold the model. In a
table of this module it would then keep the model alive for ever; as an attribute it goes with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from specdec.budget.costs import PassCosts

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class ModelState:
    """The state of one model."""

    copies: dict[str, Any] = field(default_factory=dict)  # by kind: a copy, and what it was made of
    idle_replays: list[tuple[Any, Any]] = field(default_factory=list)  # caches and the passes recorded over them
    lock: Any = field(default_factory=threading.RLock)
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> ModelState:
        """The state of ``model``; the same object at every call."""
        with _LOCK:
            states = vars(model).get(_ATTRIBUTE)
            if not isinstance(states, _States):
                states = vars(model)[_ATTRIBUTE] = _States()
            return states.by_owner.setdefault(model, cls())

    def costs(self, make: Callable[[], PassCosts] = PassCosts) -> PassCosts:
        """What its passes cost on this machine; those of ``make`` to begin with."""
        return self.keep("costs", make)

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once for each ``key``: loaded heads, tables, the probe's answer."""
        with self.lock:
            if key not in self._kept:
                self._kept[key] = make()
            return cast(T, self._kept[key])


class _States:
    """The states of a model and of its views, which share its attributes; a copy, or a file, gets an empty dict instead."""

    __slots__ = ("by_owner",)

    def __init__(self) -> None:
        self.by_owner: WeakKeyDictionary[Any, ModelState] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return dict, ()


_ATTRIBUTE = "_specdec_states"
_LOCK = threading.Lock()
