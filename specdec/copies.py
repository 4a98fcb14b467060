"""Copies of a model that share its weights, made once and kept for as long as it lives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from specdec.model_state import ModelState


def sharing_copy(model: Any) -> Any:
    """A copy of ``model`` whose modules may be replaced or set otherwise; it shares all weights and buffers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def kept_copy(kind: str, model: Any, make: Callable[[Any], Any]) -> Any:
    """``make(model)``, kept as the copy of this ``kind`` and made anew when weights, hooks, mode (training or not) or attention change.

    What is written through a weight's ``.data`` is not seen.
    """
    kept = ModelState.of(model)
    with kept.lock:  # two threads must not both make the copy that one of them throws away
        state = _state(model)
        known, ours = kept.copies.get(kind, (None, None))
        if known != state:
            ours = make(model)
            if ours is model:  # a state that held its own model would never go
                return model
            kept.copies[kind] = (state, ours)
        return ours


def _state(model: Any) -> tuple[Any, ...]:
    weights = ((id(p), None if p.is_inference() else p._version, p.dtype, p.device) for p in model.parameters())
    modules = (
        (id(m), m.training, *m._forward_hooks, None, *m._forward_pre_hooks, id(vars(m).get("forward")))
        for m in model.modules()
    )
    return (model.config.get_text_config()._attn_implementation, *weights, *modules)
