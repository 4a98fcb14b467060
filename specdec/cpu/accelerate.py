"""Faster passes on a CPU: packed linear layers, decoder layers in few operators, and grouped attention.

Everything falls back to the plain layers where a part does not fit.
"""

from __future__ import annotations

from typing import Any

import torch

from specdec.cpu.fusing import fuse
from specdec.cpu.packed_linear import is_packed, pack, packable, packing_fault
from specdec.engine.attention import NAME as GROUPED
from specdec.engine.model_state import ModelState
from specdec.engine.offload import is_offloaded
from specdec.engine.shared_copy import kept_copy, shares_attention, sharing_copy
from specdec.engine.wrapped import model_inside

_KIND = "accelerated"


def accelerated_copy(model: Any) -> Any:
    """``accelerated(model)``, kept for as long as ``model`` lives and made anew when it has changed.

    What counts as a change, and the few that are not seen: docs/models.md; after one of these, ``drop_copy``.
    """
    return kept_copy(_KIND, model, accelerated, packable)


def drop_copy(model: Any) -> None:
    """Let go of the copy that is kept for ``model``, and of its memory; the next call makes another one."""
    ModelState.of(model).copies.pop(_KIND, None)


def accelerated(model: Any, in_place: bool = False) -> Any:
    """``model`` with packed linear layers and, if it ran on ``sdpa``, fused decoder layers and grouped attention.

    Args:
        model: a transformers model on the CPU, or a module that wraps one; elsewhere, offloaded, where packing is
            impossible, or where it has been done, it is returned as it is.
        in_place: replace the layers of ``model`` itself, which then holds one copy of its weights and can no longer
            be trained, converted, moved, copied or saved; each of these is refused. Otherwise the model stays
            untouched and the result shares everything but the linear layers with it, which costs a second copy of
            their weights. All other weights, attributes, hooks and the mode are the same objects: whatever is set on
            one is set on both. A module with a forward of its own (``module.forward = ...``, or compiled) then stays
            as it is, with all below.

    A fused layer runs as the original one, only slower, while parts of it have hooks, a forward of their own or were
    replaced, and on any other attention. Linear layers are other modules afterwards: hooks belong on what
    ``model.get_submodule`` returns then. Under ``torch.autocast`` packed layers compute in the dtype of their weights.
    """
    inside = model_inside(model)
    if inside.device.type != "cpu" or is_offloaded(model) or packing_fault(inside.dtype) or is_packed(model):
        return model
    ours = model if in_place else sharing_copy(model)
    if ours is model and not in_place:
        return model
    inside = model_inside(ours)
    if inside.config.get_text_config()._attn_implementation == "sdpa" and not shares_attention(ours):
        inside.set_attn_implementation(GROUPED)
        with torch.autocast("cpu", enabled=False):  # its rounding would fail the trial of every layer
            fuse(inside)
    pack(ours)
    return ours
