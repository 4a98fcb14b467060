"""Fuses the decoder layers of a model, each only if it gives what the original gave in a trial pass of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.cpu.fused_layer import FusedLayer, Rotation
from specdec.cpu.known_layers import KEYWORDS, is_known_layer
from specdec.engine.hidden_states import decoder_layers
from specdec.engine.module_views import ModuleView, own_attributes, view_of
from specdec.engine.shared_copy import replaceable

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of what a layer adds: another order of summation
_MOST = 0.9  # of the channels: in one that nearly cancels, rounding is large


def fuse(model: Any) -> int:
    """Fuse the decoder layers of ``model`` that can be fused, in place; returns how many those are."""
    layers = _candidates(model)
    calls = _trial(model, layers) if layers else {}
    rotation, count = Rotation(), 0
    for layer, call in calls.items():
        children = {module: dict(module.named_children()) for module in (layer.self_attn, layer.mlp)}
        fused = _tried(layer, rotation, *call)
        if fused is not None:
            _install(model, layer, fused)
            count += 1
        else:
            for module, named in children.items():
                for name, child in named.items():
                    setattr(module, name, child)
    return count


def _install(model: Any, layer: Any, fused: FusedLayer) -> None:
    """Let ``fused`` be the forward of ``layer``; of a view it must not become that of its original."""
    if not isinstance(layer, ModuleView):
        layer.forward = fused
        return
    fused_view = view_of(layer, {**own_attributes(layer), "forward": fused})
    children = decoder_layers(model)._modules
    children.update({name: fused_view for name, child in children.items() if child is layer})


@torch.no_grad()
def _tried(
    layer: Any, rotation: Rotation, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Tensor
) -> FusedLayer | None:
    """``layer`` fused, if that gives what the layer gave; in 16 bits, whose rounding hides much, in float32 as well."""
    try:
        if expected.dtype != torch.float32:
            wide, (wide_args, wide_kwargs) = copy.deepcopy(layer).float(), _in_float32((args, kwargs))
            wide_expected = wide(*wide_args, **wide_kwargs)
            if _tried(wide, Rotation(), wide_args, wide_kwargs, wide_expected) is None:
                return None
            del wide, wide_args, wide_kwargs, wide_expected
        fused = FusedLayer(layer, rotation)
        return fused if _is_equal(fused.fused(*args, **kwargs), expected, args[0]) else None
    except Exception:  # a layer may have the names of Llama's and other shapes
        return None


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float32(entry) for key, entry in value.items()}
    return tuple(map(_in_float32, value)) if isinstance(value, tuple | list) else value


def _is_equal(output: Tensor, expected: Tensor, hidden_states: Tensor) -> bool:
    """Whether a layer's ``output`` for ``hidden_states`` (B, T, H) is what was ``expected``, but for the order of sums.

    Judged in each channel, by what the layer adds: a few channels of many models are a thousand times as large as all
    others, and a large residual hides nothing but its own rounding.
    """
    if output.shape != expected.shape:
        return False
    error, added, whole = (
        t.double().flatten(0, 1).norm(dim=0) for t in (output - expected, expected - hidden_states, expected)
    )
    allowed = _TOLERANCE[expected.dtype] * added + torch.finfo(expected.dtype).eps * whole
    return bool((error <= allowed).float().mean() >= _MOST)


def _candidates(model: Any) -> list[Any]:
    """The decoder layers that are built and written like those that are known."""
    try:
        layers = list(decoder_layers(model))
    except (ValueError, AttributeError):
        return []
    own = set(replaceable(model))
    return [layer for layer in layers if is_known_layer(layer) and own.issuperset((layer, layer.self_attn, layer.mlp))]


@torch.no_grad()
def _trial(model: Any, layers: Sequence[Any]) -> dict[Any, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """How the model calls its layers in a small pass, and what they return; empty if it cannot be called like this."""
    calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A copy shares its hooks with the model, which may be running in another thread.
        if layer in layers and isinstance(output, Tensor) and len(args) == 1 and set(kwargs) <= KEYWORDS:
            calls[layer] = (args, kwargs, output)

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    ids = torch.arange(10).view(2, 5) % model.config.get_text_config().vocab_size
    try:
        model(input_ids=ids, use_cache=False)
    except Exception:  # whatever a model does that wants more than ids
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return calls
