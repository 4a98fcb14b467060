"""EAGLE checkpoints of the documented layouts, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

H, V, VD, D, HEADS, GROUPS, I = 8, 20, 6, 4, 2, 1, 12  # noqa: E741
Tensors = dict[str, Tensor]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": H, "intermediate_size": I,
    "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": D,
    "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "vocab_size": V, "draft_vocab_size": VD, "torch_dtype": "float32",
}  # fmt: skip
IDS = torch.tensor([1, 2, 5, 9, 10, 19])


def eagle3() -> Tensors:
    """The documented layout, written by hand."""
    shapes = {
        "fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (VD, H), "midlayer.hidden_norm.weight": (H,),
        "midlayer.input_layernorm.weight": (H,), "midlayer.post_attention_layernorm.weight": (H,),
        "midlayer.self_attn.q_proj.weight": (HEADS * D, 2 * H), "midlayer.self_attn.k_proj.weight": (GROUPS * D, 2 * H),
        "midlayer.self_attn.v_proj.weight": (GROUPS * D, 2 * H), "midlayer.self_attn.o_proj.weight": (H, HEADS * D),
        "midlayer.mlp.gate_proj.weight": (I, H), "midlayer.mlp.up_proj.weight": (I, H),
        "midlayer.mlp.down_proj.weight": (H, I),
    }  # fmt: skip
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    tensors["d2t"] = IDS - torch.arange(VD)
    tensors["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill_(0, IDS, True)
    return tensors


def eagle1(layers: int = 1, bias: bool = False) -> Tensors:
    tensors = {"fc.weight": torch.randn(H, 2 * H)} | ({"fc.bias": torch.randn(H)} if bias else {})
    for i in range(layers):
        own = {
            key: value for key, value in eagle3().items() if ".self_attn." in key or ".mlp." in key or ".post_" in key
        }
        for key, value in own.items():
            wide = key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
            tensors[key.replace("midlayer", f"layers.{i}")] = value[:, :H].clone() if wide else value
        if i:
            tensors[f"layers.{i}.input_layernorm.weight"] = torch.ones(H)
    return tensors


def write(path: Path, tensors: Tensors, suffix: str = "safetensors", **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    if suffix == "safetensors":
        save_file(tensors, path / "model.safetensors")
    else:
        torch.save(tensors, path / "pytorch_model.bin")
    return path
