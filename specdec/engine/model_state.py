"""What is kept beside one model object for as long as it lives, so that the next call starts where the last one ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from specdec.budget import PassCosts

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class ModelState:
    """The state of one model. Nothing in it may refer to the model itself, or the model would never be freed."""

    copies: dict[str, Any] = field(default_factory=dict)  # by kind: a copy, and what it was made of
    idle_replays: list[tuple[Any, Any]] = field(default_factory=list)  # caches and the passes recorded over them
    lock: Any = field(default_factory=threading.RLock)
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> ModelState:
        """The state of ``model``; the same object at every call."""
        with _LOCK:
            return _STATES.setdefault(model, cls())

    def costs(self, make: Callable[[], PassCosts] = PassCosts) -> PassCosts:
        """What its passes cost on this machine; those of ``make`` to begin with."""
        return self.keep("costs", make)

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once for each ``key``: loaded heads, tables, the probe's answer."""
        with self.lock:
            if key not in self._kept:
                self._kept[key] = make()
            return cast(T, self._kept[key])


_LOCK = threading.Lock()
_STATES: WeakKeyDictionary[Any, ModelState] = WeakKeyDictionary()
