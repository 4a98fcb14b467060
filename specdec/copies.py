"""Copies of a model that share its weights, made once and kept for as long as it lives."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

_MAKING = threading.RLock()  # two threads must not both make the copy that one of them throws away
Copies = WeakKeyDictionary[Any, tuple[Any, Any]]  # model -> (its state when the copy was made, the copy)


def sharing_copy(model: Any) -> Any:
    """A copy of ``model`` whose modules may be replaced or set otherwise; it shares all weights and buffers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def kept_copy(copies: Copies, model: Any, make: Callable[[Any], Any]) -> Any:
    """``make(model)`` as kept in ``copies``, made anew when weights, hooks, mode (training or not) or attention change.

    What is written through a weight's ``.data`` is not seen.
    """
    with _MAKING:
        state = _state(model)
        known, ours = copies.get(model, (None, None))
        if known != state:
            ours = make(model)
            if ours is model:  # an entry that held its own key would never go
                return model
            copies[model] = (state, ours)
        return ours


def _state(model: Any) -> tuple[Any, ...]:
    weights = ((id(p), None if p.is_inference() else p._version, p.dtype, p.device) for p in model.parameters())
    modules = (
        (id(m), m.training, *m._forward_hooks, None, *m._forward_pre_hooks, id(vars(m).get("forward")))
        for m in model.modules()
    )
    return (model.config.get_text_config()._attn_implementation, *weights, *modules)
