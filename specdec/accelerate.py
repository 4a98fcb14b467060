"""Faster passes on a CPU: packed linear layers, decoder layers in few operators, and grouped attention.

Everything falls back to the plain layers where a part does not fit.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

from specdec.fused_layer import fuse
from specdec.grouped_attention import NAME as GROUPED
from specdec.packed_linear import is_packed, pack, packing_fault

_COPIES: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()


def accelerated_copy(model: Any) -> Any:
    """``accelerated(model)``, kept for as long as ``model`` lives.

    It is made anew when weights, hooks or the mode (training or not) have changed. What is written through a weight's
    ``.data`` is not seen.
    """
    state = state_of(model)
    known, ours = _COPIES.get(model, (None, None))
    if known != state:
        ours = accelerated(model)
        if ours is model:  # an entry that held its own key would never go
            return model
        _COPIES[model] = (state, ours)
    return ours


def state_of(model: Any) -> tuple[Any, ...]:
    """What a copy that shares weights with ``model`` was made of: it differs once weights, hooks or the mode change."""
    weights = ((id(p), None if p.is_inference() else p._version, p.dtype, p.device) for p in model.parameters())
    modules = (
        (id(m), m.training, *m._forward_hooks, None, *m._forward_pre_hooks, id(vars(m).get("forward")))
        for m in model.modules()
    )
    return (*weights, *modules)


def accelerated(model: Any, in_place: bool = False) -> Any:
    """``model`` with packed linear layers and, if it ran on ``sdpa``, fused decoder layers and grouped attention.

    Args:
        model: a transformers model on the CPU; elsewhere, where packing is impossible, or where it has been done, it is
            returned as it is.
        in_place: replace the layers of ``model`` itself, which then holds one copy of its weights and can no longer
            be trained, copied or saved. Otherwise the model stays untouched and the result shares everything but the
            linear layers with it, which costs a second copy of their weights.
    """
    if model.device.type != "cpu" or packing_fault(model.dtype) or is_packed(model):
        return model
    if not in_place:
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
        fuse(model)
    pack(model)
    return model
