"""Faster passes on a CPU: packed linear layers, decoder layers in few operators, and grouped attention.

Everything falls back to the plain layers where a part does not fit.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

from specdec.fused_layer import fuse
from specdec.grouped_attention import NAME as GROUPED
from specdec.packed_linear import pack, packing_fault

_COPIES: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()


def accelerated_copy(model: Any) -> Any:
    """``accelerated(model)``, kept for as long as ``model`` lives and made anew when its weights have changed."""
    state = tuple((id(p), p._version, p.dtype, p.device) for p in model.parameters())
    if _COPIES.get(model, (None, None))[0] != state:
        _COPIES[model] = (state, accelerated(model))
    return _COPIES[model][1]


def accelerated(model: Any, in_place: bool = False) -> Any:
    """``model`` with packed linear layers and, if it ran on ``sdpa``, fused decoder layers and grouped attention.

    Args:
        model: a transformers model on the CPU; elsewhere, or where packing is impossible, it is returned as it is.
        in_place: replace the layers of ``model`` itself, which then holds one copy of its weights and can no longer
            be trained or saved. Otherwise the model stays untouched and the result shares everything but the linear
            layers with it, which costs a second copy of their weights.
    """
    if model.device.type != "cpu" or packing_fault(model.dtype):
        return model
    if not in_place:
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
        fuse(model)
    pack(model)
    return model
