"""Faster passes on a CPU: packed linear layers, decoder layers in few operators, and grouped attention.

Everything falls back to the plain layers where a part does not fit.
"""

from __future__ import annotations

from typing import Any

import torch

from specdec.copies import kept_copy, sharing_copy
from specdec.fused_layer import fuse
from specdec.grouped_attention import NAME as GROUPED
from specdec.packed_linear import is_packed, pack, packing_fault


def accelerated_copy(model: Any) -> Any:
    """``accelerated(model)``, kept for as long as ``model`` lives and made anew when it has changed (``kept_copy``)."""
    return kept_copy("accelerated", model, accelerated)


def accelerated(model: Any, in_place: bool = False) -> Any:
    """``model`` with packed linear layers and, if it ran on ``sdpa``, fused decoder layers and grouped attention.

    Args:
        model: a transformers model on the CPU; elsewhere, where packing is impossible, or where it has been done, it is
            returned as it is.
        in_place: replace the layers of ``model`` itself, which then holds one copy of its weights and can no longer
            be trained, converted, moved, copied or saved; each of these is refused. Otherwise the model stays
            untouched and the result shares everything but the linear layers with it, which costs a second copy of
            their weights.

    A fused layer runs as the original one, only slower, while parts of it have hooks, a forward of their own or were
    replaced, and on any other attention. Linear layers are other modules afterwards: hooks belong on what
    ``model.get_submodule`` returns then. Under ``torch.autocast`` packed layers compute in the dtype of their weights.
    """
    if model.device.type != "cpu" or packing_fault(model.dtype) or is_packed(model):
        return model
    if not in_place:
        model = sharing_copy(model)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
        with torch.autocast("cpu", enabled=False):  # its rounding would fail the trial of every layer
            fuse(model)
    pack(model)
    return model
