"""Weights that EAGLE-3's cell begins with: the target's last decoder layer, whatever its family calls its norms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.heads.eagle_cell import EagleCell
from specdec.engine.hidden_states import decoder_layers

_LARGE = 2.0**10


@torch.no_grad()
def warm_start(cell: EagleCell, model: nn.Module) -> bool:
    """Copy the target's last decoder layer into the cell, as far as its parts have the same names and shapes.

    Attention reads the embedding and the state side by side, so each half gets the layer's weights by a half; the
    first state is the last of the three features. The output matrix is the target's at the draft vocabulary. A norm
    gets the scale of the one that stands before the same part of the target, be it stored as such or as an offset
    from 1. Returns whether the whole layer fitted.
    """
    layer = decoder_layers(model)[-1]
    size, source = cell.config.hidden_size, dict(layer.state_dict())
    attention, feedforward, output = _norms_before(model, layer)
    norms = {"input_layernorm": attention, "hidden_norm": attention, "post_attention_layernorm": feedforward}
    fitted = True
    for name, parameter in cell.midlayer.named_parameters():
        part = name.split(".")[0]
        value = norm_scale(norms[part], size) if part in norms else source.get(name)
        if value is not None and name.split(".")[1][:1] in "qkv" and value.dim() == 2:
            value = torch.cat([value, value], 1) / 2
        if value is None or value.shape != parameter.shape:
            fitted = False
            continue
        parameter.copy_(value)
    if cell.fc is not None and cell.fc.weight.shape == (size, 3 * size):
        cell.fc.weight.zero_()
        cell.fc.weight[:, 2 * size :].fill_diagonal_(1.0)
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    if head.shape[1] == size:
        cell.lm_head.weight.copy_(head[cell.target_ids()])
    final = norm_scale(output, size)
    if final is not None:
        cell.norm.weight.copy_(final)
    return fitted


def _norms_before(model: Any, layer: nn.Module) -> list[nn.Module | None]:
    """What made the input of ``layer``'s attention, of its feed-forward part and of the output matrix, seen in a pass.

    Architectures agree neither on the names of their norms nor on their places.
    """
    decoder, parts = model.get_decoder(), dict(layer.named_modules())
    outputs: list[tuple[nn.Module, Any]] = []  # all are kept: memory that is used again would deceive
    read: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, out: outputs.append((module, out)))
        for module in decoder.modules()
        if not any(True for _ in module.children())
    ]
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        if name in parts:
            see = partial(_see, read, name)
            hooks.append(parts[name].register_forward_pre_hook(see))
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        read["output"] = decoder(input_ids=ids, use_cache=False)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return [_maker(read.get(name), outputs) for name in ("self_attn.q_proj", "mlp.gate_proj", "output")]


def _see(read: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    read[name] = args[0]


def _maker(x: Tensor | None, outputs: Sequence[tuple[nn.Module, Any]]) -> nn.Module | None:
    """The first module that put out ``x``, perhaps in another shape."""
    for module, out in outputs:
        if x is not None and isinstance(out, Tensor) and (out.data_ptr(), out.numel()) == (x.data_ptr(), x.numel()):
            return module
    return None


@torch.no_grad()
def norm_scale(norm: nn.Module | None, size: int) -> Tensor | None:
    """(H,) what ``norm`` multiplies each of ``size`` normalised values by, whatever it stores; None if it is no norm.

    A vector of 1 and -1 in turn has mean 0 and length 1 already, so a norm gives back its scale with these signs, plus
    its bias; a large multiple of it makes nothing of the epsilon.
    """
    if norm is None:
        return None
    norm = copy.deepcopy(norm).float()
    signs = torch.ones(size, device=next((p.device for p in norm.parameters()), None))
    signs[1::2] = -1
    up, twice, down = (norm(factor * signs) for factor in (_LARGE, 2 * _LARGE, -_LARGE))
    if up.shape != signs.shape or not torch.allclose(up, twice):
        return None
    scale: Tensor = signs * (up - down) / 2
    return scale
