"""Which decoder layers are of Llama's kind: read from the names that their code uses, never from the name of a class.

A family that adds a softcap or a second norm uses other names, and so is left alone without being listed.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

from torch import nn

from specdec.cpu.packed_linear import plain_weight
from specdec.engine.shared_copy import is_changed

KEYWORDS = frozenset("attention_mask position_ids past_key_values use_cache position_embeddings".split())
_PARTS = frozenset("input_layernorm self_attn post_attention_layernorm mlp".split())
_PROJECTIONS = frozenset("q_proj k_proj v_proj o_proj".split())
_HEAD_NORMS = frozenset("q_norm k_norm".split())
_MLP_PARTS = frozenset("gate_proj up_proj down_proj act_fn".split())
_LAYER_NAMES = _PARTS | KEYWORDS | {"hidden_states"}
_ATTENTION_NAMES = (
    _PROJECTIONS
    | _HEAD_NORMS
    | frozenset(
        "shape head_dim view transpose reshape contiguous apply_rotary_pos_emb update layer_idx getattr"
        " ALL_ATTENTION_FUNCTIONS get_interface config _attn_implementation eager_attention_forward"
        " training attention_dropout dropout scaling sliding_window use_rope".split()
    )
)
NORM_NAMES = frozenset(
    "dtype to torch float32 pow mean keepdim rsqrt variance_epsilon eps weight F rms_norm normalized_shape".split()
)


def is_known_layer(layer: Any) -> bool:
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
        and names_of(layer) <= _LAYER_NAMES
        and names_of(attention) <= _ATTENTION_NAMES
        and names_of(mlp) <= _MLP_PARTS
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def names_of(module: nn.Module) -> set[str]:
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
