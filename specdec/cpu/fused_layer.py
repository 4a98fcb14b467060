"""Decoder layers of the common kind in a dozen operators: what is left to gain on a CPU once linear layers are packed.

A layer of Llama's kind (two norms, attention with rotary positions, a gated MLP) runs as some sixty operators and a
dozen Python modules, which cost as much as its matrix products where only a few tokens are processed. Here the
products with one input are one product, rotations are two operators, and modules that only pass on are left out.
What a layer is, is read from the names that its code uses, never from the name of its class, and a fused layer is
taken only if it gives what the original gave in a trial pass of the model. Letters: B rows, T tokens, H hidden size,
h query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import contains
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.cpu.packed_linear import PackedLinear, PackedSlice, plain_weight
from specdec.engine.hidden_states import decoder_layers
from specdec.engine.module_views import ModuleView, own_attributes, view_of
from specdec.engine.shared_copy import is_changed, replaceable

_KEYWORDS = frozenset("attention_mask position_ids past_key_values use_cache position_embeddings".split())
_PARTS = frozenset("input_layernorm self_attn post_attention_layernorm mlp".split())
_PROJECTIONS = frozenset("q_proj k_proj v_proj o_proj".split())
_HEAD_NORMS = frozenset("q_norm k_norm".split())
_MLP_PARTS = frozenset("gate_proj up_proj down_proj act_fn".split())
_LAYER_NAMES = _PARTS | _KEYWORDS | {"hidden_states"}
_ATTENTION_NAMES = (
    _PROJECTIONS
    | _HEAD_NORMS
    | frozenset(
        "shape head_dim view transpose reshape contiguous apply_rotary_pos_emb update layer_idx getattr"
        " ALL_ATTENTION_FUNCTIONS get_interface config _attn_implementation eager_attention_forward"
        " training attention_dropout dropout scaling sliding_window use_rope".split()
    )
)
_NORM_NAMES = frozenset(
    "dtype to torch float32 pow mean keepdim rsqrt variance_epsilon eps weight F rms_norm normalized_shape".split()
)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of what a layer adds: another order of summation
_ATTENTION = "_attn_implementation_internal"  # where a config of transformers keeps its attention
_MOST = 0.9  # of the channels: in one that nearly cancels, rounding is large


class FusedLayer:
    """The forward of one decoder layer; a drop-in for ``layer.forward``.

    Takes the weights of ``layer`` into packed matrices of its own and leaves views of these in their place. While
    the layer differs from what was tried (parts with hooks or a forward of their own, parts that were replaced,
    another attention), its own code runs over these views. All numbers that its code reads are read at each call.
    """

    def __init__(self, layer: nn.Module, rotation: Rotation) -> None:
        self._unfused: Callable[..., Tensor] = layer.forward
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self.attention = attention
        self.rotation = rotation
        self._members, self._turns = vars(attention), getattr(attention, "use_rope", True)
        self.head_dim: int = attention.head_dim
        self.num_q: int = attention.q_proj.weight.shape[0] // self.head_dim
        self.num_kv: int = attention.k_proj.weight.shape[0] // self.head_dim
        self.norms: tuple[Norm, Norm] = (norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm))
        self.q_norm: Norm | None = norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm: Norm | None = norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.qkv = merged(attention, ("q_proj", "k_proj", "v_proj"))
        self.gate_up = merged(mlp, ("gate_proj", "up_proj"))
        attention.o_proj = self.out = PackedLinear.of(attention.o_proj)
        mlp.down_proj = self.down = PackedLinear.of(mlp.down_proj)
        self.act: Callable[[Tensor], Tensor] = mlp.act_fn
        self._implementation: str = attention.config._attn_implementation
        self._config = attention.config
        self._parts = Parts(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What ``layer.forward`` takes and returns."""
        if not self._is_as_tried():
            return self._unfused(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):  # packed weights have one dtype
            with torch.autocast("cpu", enabled=False):
                return self.fused(*args, **kwargs)
        return self.fused(*args, **kwargs)

    def _is_as_tried(self) -> bool:
        # Read like this because a config's own way takes as long as a small operator.
        attention = object.__getattribute__(self._config, _ATTENTION)
        is_same = attention == self._implementation and self.attention.head_dim == self.head_dim
        return is_same and not self._parts.are_changed()

    def fused(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, T, H) from ``hidden_states`` (B, T, H); the other arguments are those of the layer."""
        mixed = self._attend(self.norms[0](hidden_states), attention_mask, past_key_values, position_embeddings, kwargs)
        hidden_states = self.out.plus(mixed, hidden_states)
        gate, up = self.gate_up(self.norms[1](hidden_states)).chunk(2, -1)
        return self.down.plus(self.act(gate) * up, hidden_states)

    def _attend(
        self, x: Tensor, mask: Tensor | None, cache: Any, position_embeddings: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """(B, T, h D) from the normed ``x`` (B, T, H)."""
        batch, num_tokens, _ = x.shape
        attention, size = self.attention, self.head_dim
        heads = self.qkv(x).view(batch, num_tokens, -1, size).transpose(1, 2)
        rotated, value = heads.split((self.num_q + self.num_kv, self.num_kv), 1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = rotated.split((self.num_q, self.num_kv), 1)
            rotated = torch.cat((self.q_norm(query), self.k_norm(key)), 1)
        if self._members.get("use_rope", self._turns):
            rotated = self.rotation(rotated, *position_embeddings)
        query, key = rotated.split((self.num_q, self.num_kv), 1)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self._implementation]
        dropout = getattr(attention, "attention_dropout", 0.0) if attention.training else 0.0
        out, _ = attend(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling, **kwargs)
        return out.view(batch, num_tokens, -1)  # type: ignore[no-any-return]


class Parts:
    """The modules below a layer, and whether they are still as they were.

    It is asked in every layer of every pass, between weights that leave nothing else in the caches: so hooks are looked
    for only after torch has numbered a new one anywhere.
    """

    def __init__(self, layer: nn.Module) -> None:
        modules = list(layer.modules())
        self._children = [module._modules for module in modules]
        self._known_children = [dict(children) for children in self._children]
        self._members = [vars(part) for part in modules[1:]]
        self._hooks: list[Any] = [_global_forward_hooks, _global_forward_pre_hooks]
        self._hooks += [hooks for part in modules[1:] for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._last_hook = -1  # the number that the next hook had when there were none here

    def are_changed(self) -> bool:
        """Whether one was replaced, or does more than its class: hooks, or a forward of its own."""
        return (
            self._are_hooked()
            or self._children != self._known_children
            or any(map(contains, self._members, repeat("forward")))
        )

    def _are_hooked(self) -> bool:
        next_hook = RemovableHandle.next_id
        if next_hook == self._last_hook:
            return False
        if any(self._hooks):
            return True
        self._last_hook = next_hook
        return False


Norm = Callable[[Tensor], Tensor]


class Rotation:
    """Rotary positions; what all layers of a pass have in common is computed once."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # replaced whole: threads may share a model

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` (B, heads, T, D) turned by ``cos`` and ``sin`` (B, T, D), halves against each other."""
        half = cos.shape[-1] // 2
        known = self._known
        if known is None or known[0] is not cos or known[1] is not sin:
            signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
            self._known = known = (cos, sin, cos.unsqueeze(1), signed.unsqueeze(1))
        return x * known[2] + torch.roll(x, half, -1) * known[3]


def norm_of(module: Any) -> Norm:
    """``module`` as one fused operator if that is the same to the last bit, else ``module`` itself.

    Weight and epsilon are read at each call, and its code must read nothing else.
    """
    members: dict[str, Any] = vars(module)
    weights: dict[str, Tensor] = module._parameters
    eps = next((name for name in ("variance_epsilon", "eps") if isinstance(members.get(name), float)), None)
    weight = weights.get("weight")
    if eps is None or weight is None or weight.dim() != 1 or not _names(module) <= _NORM_NAMES:
        return module  # type: ignore[no-any-return]

    def fused(x: Tensor) -> Tensor:
        return torch.rms_norm(x, x.shape[-1:], None, float(members[eps])) * weights["weight"]

    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0])[:, None]
    x = (torch.randn(5, len(weight), generator=generator) * scales).to(weight.dtype)[None]
    return fused if torch.equal(fused(x), module(x)) else module


def merged(parent: nn.Module, names: Sequence[str]) -> PackedLinear:
    """One packed layer for all of ``names`` below ``parent``, which become views of it."""
    layers = [getattr(parent, name) for name in names]
    weight = torch.cat([layer.weight for layer in layers])
    biases = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    whole = PackedLinear(weight, None if all(layer.bias is None for layer in layers) else torch.cat(biases))
    start = 0
    for name, layer in zip(names, layers, strict=True):
        setattr(parent, name, PackedSlice(whole, start, len(layer.weight)))
        start += len(layer.weight)
    return whole


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
    ours = view_of(layer, {**own_attributes(layer), "forward": fused})
    children = decoder_layers(model)._modules
    children.update({name: ours for name, child in children.items() if child is layer})


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


def _is_equal(found: Tensor, expected: Tensor, given: Tensor) -> bool:
    """Whether a layer that was ``given`` (B, T, H) returned what was ``expected``, but for the order of summation.

    Judged in each channel, by what the layer adds: a few channels of many models are a thousand times as large as all
    others, and a large residual hides nothing but its own rounding.
    """
    if found.shape != expected.shape:
        return False
    error, added, whole = (t.double().flatten(0, 1).norm(dim=0) for t in (found - expected, expected - given, expected))
    allowed = _TOLERANCE[expected.dtype] * added + torch.finfo(expected.dtype).eps * whole
    return bool((error <= allowed).float().mean() >= _MOST)


def _candidates(model: Any) -> list[Any]:
    """The decoder layers that are built and written like those that are known."""
    try:
        layers = list(decoder_layers(model))
    except (ValueError, AttributeError):
        return []
    own = set(replaceable(model))
    return [layer for layer in layers if _is_known(layer) and own.issuperset((layer, layer.self_attn, layer.mlp))]


def _is_known(layer: Any) -> bool:
    """Whether a layer has the parts of Llama's, all linear ones plain, and its code uses nothing else."""
    if _children(layer) != _PARTS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if _children(attention) not in (_PROJECTIONS, _PROJECTIONS | _HEAD_NORMS) or _children(mlp) != _MLP_PARTS:
        return False
    linear = [getattr(attention, name) for name in _PROJECTIONS] + [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(type(child) is nn.Linear and plain_weight(child) is not None for child in linear)
        and len({child.weight.dtype for child in linear}) == 1
        and not any(is_changed(module) for module in layer.modules())
        and _names(layer) <= _LAYER_NAMES
        and _names(attention) <= _ATTENTION_NAMES
        and _names(mlp) <= _MLP_PARTS
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _names(module: nn.Module) -> set[str]:
    """The globals, attributes, keywords and strings that the code of a module's forward uses."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return _code_names(forward.__code__) - {forward.__doc__}


def _code_names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, tuple):
            names.update(word for word in constant if isinstance(word, str))
        elif isinstance(constant, CodeType):  # functions within
            names |= _code_names(constant)
    return names


@torch.no_grad()
def _trial(model: Any, layers: Sequence[Any]) -> dict[Any, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """How the model calls its layers in a small pass, and what they return; empty if it cannot be called like this."""
    calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A copy shares its hooks with the model, which may be running in another thread.
        if layer in layers and isinstance(output, Tensor) and len(args) == 1 and set(kwargs) <= _KEYWORDS:
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
