"""Models of any size that compute the same function as a small one: text and acceptance are real, and so is the cost.

What is added to a model of Llama's kind contributes nothing: the residual stream ends in zeros, new heads and new
intermediate channels are multiplied by zero columns, new layers add zero. Weights that meet only zeros are random, as
a GPU that multiplies by zeros draws less power and runs faster. Letters: H hidden size, h query heads, G key-value
heads, D head size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
        )


# The 8b is Llama-3.1-8B but for its vocabulary, which has to stay the small model's.
SHAPES = {
    "1b": Shape(1536, 6144, 30, 24, 8, 64),
    "3b": Shape(2560, 8960, 36, 32, 8, 64),
    "8b": Shape(4096, 14336, 32, 32, 8, 128),
}


@torch.no_grad()
def inflated(model: Any, shape: Shape) -> Any:
    """``model`` in ``shape``, with the same outputs up to rounding.

    Raises:
        ValueError: a shape that ``model`` does not fit into, or layers of another kind than Llama's.
    """
    old = Shape.of(model.config)
    _check(model, old, shape)
    config = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = (
        shape.hidden,
        shape.intermediate,
        shape.layers,
    )
    config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads
    config.head_dim = shape.head_dim
    # The mean of the squares is taken over more channels, all of them zero.
    config.rms_norm_eps *= old.hidden / shape.hidden
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * shape.layers
    with model.device:
        attention = model.config._attn_implementation
        large = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention).eval()
    large.generation_config = copy.deepcopy(model.generation_config)
    _fill(large, model, old, shape)
    return large


def _check(model: Any, old: Shape, new: Shape) -> None:
    kinds = {name.split(".")[-2] for name, _ in model.model.layers[0].named_parameters()}
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if kinds != known | {"input_layernorm", "post_attention_layernorm"} or any(
        "bias" in n for n, _ in model.named_parameters()
    ):
        raise ValueError(f"only layers of Llama's kind without biases can be inflated, got {type(model).__name__}")
    sizes = ("hidden", "intermediate", "layers", "kv_heads")
    smaller = [name for name in sizes if getattr(new, name) < getattr(old, name)]
    if smaller or new.heads // new.kv_heads < old.heads // old.kv_heads or new.heads % new.kv_heads:
        raise ValueError(f"a shape must be at least {old} in every size and in heads a key-value head, got {new}")
    if new.head_dim % old.head_dim:
        raise ValueError(f"the head size must be a multiple of {old.head_dim} (rotary frequencies), got {new.head_dim}")


def _fill(large: Any, small: Any, old: Shape, new: Shape) -> None:
    device = small.device
    heads, kv_heads = _places(old, new, device)
    kept = torch.arange(old.hidden, device=device)
    channels = torch.arange(old.intermediate, device=device)
    _zeroed(large.model.embed_tokens.weight)[:, : old.hidden] = small.model.embed_tokens.weight
    if large.lm_head.weight is not large.model.embed_tokens.weight:
        large.lm_head.weight[:, : old.hidden] = small.lm_head.weight
    _fill_norm(large.model.norm, small.model.norm)
    for i, layer in enumerate(large.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        _zeroed(attention.o_proj.weight)
        _zeroed(mlp.down_proj.weight)
        if i >= old.layers:
            continue
        source = small.model.layers[i]
        _fill_norm(layer.input_layernorm, source.input_layernorm)
        _fill_norm(layer.post_attention_layernorm, source.post_attention_layernorm)
        # Scores are divided by the root of the head size; channels that a head did not have must not count.
        attention.q_proj.weight.view(new.heads, new.head_dim, -1)[heads[:, 0] // new.head_dim] = 0
        scale = (new.head_dim / old.head_dim) ** 0.5
        _place(attention.q_proj, source.self_attn.q_proj.weight * scale, heads.flatten(), kept)
        _place(attention.k_proj, source.self_attn.k_proj.weight, kv_heads.flatten(), kept)
        _place(attention.v_proj, source.self_attn.v_proj.weight, kv_heads.flatten(), kept)
        _place(attention.o_proj, source.self_attn.o_proj.weight, kept, heads.flatten())
        _place(mlp.gate_proj, source.mlp.gate_proj.weight, channels, kept)
        _place(mlp.up_proj, source.mlp.up_proj.weight, channels, kept)
        _place(mlp.down_proj, source.mlp.down_proj.weight, kept, channels)


def _places(old: Shape, new: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """(h, D) and (G, D): the new row of each row of the old query and key-value projections.

    Channel i of a half turns with frequency base^(-2i / D): in a head k times as large it is channel k i.
    """
    half = torch.arange(old.head_dim // 2, device=device) * (new.head_dim // old.head_dim)
    channels = torch.cat([half, half + new.head_dim // 2])
    head = torch.arange(old.heads, device=device)
    group, new_group = old.heads // old.kv_heads, new.heads // new.kv_heads
    place = head // group * new_group + head % group
    kv_place = torch.arange(old.kv_heads, device=device)
    return place[:, None] * new.head_dim + channels, kv_place[:, None] * new.head_dim + channels


def _place(layer: nn.Linear, weight: Tensor, rows: Tensor, columns: Tensor) -> None:
    layer.weight[rows[:, None], columns] = weight


def _fill_norm(large: Any, small: Any) -> None:
    size, new_size = small.weight.shape[0], large.weight.shape[0]
    large.weight[:size] = small.weight * (size / new_size) ** 0.5


def _zeroed(weight: Tensor) -> Tensor:
    return weight.zero_()
