"""Decoder layers of the common kind in a dozen operators: what is left to gain on a CPU once linear layers are packed.

A layer of Llama's kind (two norms, attention with rotary positions, a gated MLP) runs as some sixty operators and a
dozen Python modules, which cost as much as its matrix products where only a few tokens are processed. Here the
products with one input are one product, rotations are two operators, and modules that only pass on are left out.
Which layers these are: ``specdec.cpu.known_layers``; how they are tried before use: ``specdec.cpu.fusing``.

Letters for shapes: B rows, T tokens, H hidden size, h query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.cpu.known_layers import NORM_NAMES, names_of
from specdec.cpu.packed_linear import PackedLinear, PackedSlice

_ATTENTION = "_attn_implementation_internal"  # where a config of transformers keeps its attention


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
    if eps is None or weight is None or weight.dim() != 1 or not names_of(module) <= NORM_NAMES:
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
