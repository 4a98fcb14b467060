"""Published layouts of EAGLE-3 heads, written down from what their formats say: files, and their network token by token.

Nothing here reads what drafters/ makes of them. Letters: T target hidden size, H the head's, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

T, HEADS, GROUPS, D, INNER, EPS, THETA = 32, 4, 2, 10, 48, 1e-5, 5000.0
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """What a head's network is, and the layout in which it is stored."""

    layout: str = "flat"  # flat, nested (eagle_config: SpecForge, SGLang, ModelOpt), speculators
    ids: tuple[int, ...] | None = None  # as the layout counts them
    entries: tuple[int, ...] = (2, 4, 5)  # of hidden_states: what the ids mean, here for eight layers
    size: int = T  # H
    num_layers: int = 1
    first: str = "midlayer"  # the first layer's name
    later_norm: str = "input_layernorm"  # of the layers after it
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    bias: bool = False  # everywhere
    own_embedding: bool = False
    output: str = "own"  # own, tied, target's
    last_state: bool = False  # no features: the target's last hidden state
    draft_vocab: tuple[int, ...] | None = (0, 2, 3, 5, 8, 9, 10)
    has_t2d: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self, vocab: int) -> dict[str, Any]:
        """config.json as the layout's writers write it."""
        layer = {
            "model_type": "qwen3" if self.qk_norm else "llama", "hidden_size": self.size, "intermediate_size": INNER,
            "num_hidden_layers": self.num_layers, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
            "head_dim": D, "hidden_act": "silu", "rms_norm_eps": EPS, "rope_theta": THETA, "vocab_size": vocab,
            "attention_bias": self.bias, "mlp_bias": self.bias, "attention_dropout": 0.0, "initializer_range": 0.02,
            "use_cache": True, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "tie_word_embeddings": self.output == "tied",
        }  # fmt: skip
        own: dict[str, Any] = {"draft_vocab_size": len(self.draft_vocab) if self.draft_vocab else None}
        own |= {"target_hidden_size": T} if self.size != T else {}
        flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        own |= {flag: getattr(self, flag) for flag in flags}
        ids = None if self.ids is None else list(self.ids)
        if self.layout == "speculators":
            verifier = {"name_or_path": "org/model", "architectures": ["LlamaForCausalLM"]}
            proposal = {"proposal_type": "greedy", "speculative_tokens": 5}
            return own | self.extra | {
                "architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "speculators_version": "0.9.0",
                "transformer_layer_config": layer, "eagle_aux_hidden_state_layer_ids": ids, "embed_requires_grad": False,
                "speculators_config": {
                    "algorithm": "eagle3", "default_proposal_method": "greedy", "proposal_methods": [proposal],
                    "verifier": verifier,
                },
            }  # fmt: skip
        config = layer | own | {"architectures": ["LlamaForCausalLMEagle3"], "transformers_version": "4.51.0"}
        config |= {"bias": True} if self.bias else {}
        if self.layout == "nested":
            config["eagle_config"] = {
                "eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": not self.last_state,
                "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False,
            }  # fmt: skip
        elif ids is not None:
            config["eagle_aux_hidden_state_layer_ids"] = ids
        return config | self.extra

    def tensors(self, vocab: int, seed: int = 0) -> Tensors:
        """Random ones, by the layout's names."""
        size, number = self.size, len(self.entries)
        shapes: dict[str, tuple[int, ...]] = {"norm.weight": (size,)}
        if not self.last_state:
            shapes["fc.weight"] = (size, number * T)
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (number * T,)
        if self.fc_norm:
            shapes |= {f"fc_norm.{i}.weight": (T,) for i in range(number)}
        for i in range(self.num_layers):
            shapes |= self._layer_shapes(self.first if i == 0 else f"layers.{i}", i)
        if self.output == "own":
            shapes["lm_head.weight"] = (len(self.draft_vocab or range(vocab)), size)
        if self.own_embedding:
            shapes["embed_tokens.weight"] = (vocab, size)
        if self.bias:
            linear = [key for key in shapes if "_proj.weight" in key or key == "fc.weight"]
            shapes |= {key.replace(".weight", ".bias"): shapes[key][:1] for key in linear}
        generator = torch.Generator().manual_seed(seed)
        rng = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        is_matrix = {key: value.dim() > 1 or key.endswith("bias") for key, value in rng.items()}
        tensors = {key: 0.3 * value if is_matrix[key] else 1 + 0.3 * value for key, value in rng.items()}
        if self.output == "own":
            tensors["lm_head.weight"] *= 0.1  # drafts in doubt, whose trees are wide
        if self.draft_vocab:
            ids = torch.tensor(self.draft_vocab)
            tensors["d2t"] = ids - torch.arange(len(ids))
            if self.has_t2d:
                tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
        return tensors

    def _layer_shapes(self, name: str, i: int) -> dict[str, tuple[int, ...]]:
        size, wide = self.size, 2 * self.size if i == 0 else self.size
        norms = ("hidden_norm", "input_layernorm") if i == 0 else (self.later_norm,)
        shapes = {f"{name}.{norm}.weight": (size,) for norm in (*norms, "post_attention_layernorm")}
        if self.qk_norm:
            shapes |= {f"{name}.self_attn.{norm}.weight": (D,) for norm in ("q_norm", "k_norm")}
        return shapes | {
            f"{name}.self_attn.q_proj.weight": (HEADS * D, wide), f"{name}.self_attn.k_proj.weight": (GROUPS * D, wide),
            f"{name}.self_attn.v_proj.weight": (GROUPS * D, wide), f"{name}.self_attn.o_proj.weight": (size, HEADS * D),
            f"{name}.mlp.gate_proj.weight": (INNER, size), f"{name}.mlp.up_proj.weight": (INNER, size),
            f"{name}.mlp.down_proj.weight": (size, INNER),
        }  # fmt: skip

    def write(self, path: Path, vocab: int) -> Path:
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config(vocab)))
        save_file(self.tensors(vocab), path / "model.safetensors")
        return path


@dataclass
class Network:
    """The network of ``head`` with ``tensors``, one token at a time: no batch, no tree, no cache buffers."""

    head: Head
    tensors: Tensors
    model: LlamaForCausalLM
    keys: list[list[Tensor]] = field(init=False)
    values: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        dtype = self.model.dtype
        self.tensors = {key: value if key in ("d2t", "t2d") else value.to(dtype) for key, value in self.tensors.items()}
        self.keys, self.values = ([[] for _ in range(self.head.num_layers)] for _ in range(2))

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = self.tensors[f"{name}.weight"] @ x
        return out + self.tensors[f"{name}.bias"] if self.head.bias else out

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self.tensors[f"{name}.weight"]

    def first_state(self, token_states: Sequence[Tensor], last: Tensor) -> Tensor:
        """From the target's ``hidden_states`` at one token, and the last of them after the final norm."""
        if self.head.last_state:
            return last
        features = [token_states[i] for i in self.head.entries]
        if self.head.norm_before_fc:
            features = list(self.norm("input_norm", torch.cat(features)).split(T))
        if self.head.fc_norm:
            features = [self.norm(f"fc_norm.{i}", feature) for i, feature in enumerate(features)]
        return self.linear("fc", torch.cat(features))

    def rotated(self, x: Tensor, position: int) -> Tensor:
        """(heads, D): the pair (i, i + D / 2) as a complex number, turned."""
        half = D // 2
        angles = position * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.polar(
            torch.ones(half).double(), angles
        )
        return torch.cat([turned.real, turned.imag], -1).to(x.dtype)

    def attended(self, i: int, name: str, x: Tensor) -> Tensor:
        q, k, v = (self.linear(f"{name}.self_attn.{part}_proj", x).view(-1, D) for part in "qkv")
        if self.head.qk_norm:
            q, k = self.norm(f"{name}.self_attn.q_norm", q), self.norm(f"{name}.self_attn.k_norm", k)
        position = len(self.keys[i])
        self.keys[i].append(self.rotated(k, position))
        self.values[i].append(v)
        out = []
        for head, query in enumerate(self.rotated(q, position)):
            group = head // (HEADS // GROUPS)
            weights = torch.stack([query @ key[group] / D**0.5 for key in self.keys[i]]).softmax(0)
            out.append(sum(w * value[group] for w, value in zip(weights, self.values[i], strict=True)))
        return self.linear(f"{name}.self_attn.o_proj", torch.cat(out))  # type: ignore[arg-type]

    def feedforward(self, name: str, h: Tensor) -> Tensor:
        x = self.norm(f"{name}.post_attention_layernorm", h)
        gate, up = (self.linear(f"{name}.mlp.{part}_proj", x) for part in ("gate", "up"))
        return h + self.linear(f"{name}.mlp.down_proj", gate * gate.sigmoid() * up)

    def step(self, token: int, state: Tensor) -> Tensor:
        """What the next step reads."""
        table = self.tensors["embed_tokens.weight"] if self.head.own_embedding else self.model.model.embed_tokens.weight
        first = self.head.first
        normed = self.norm(f"{first}.hidden_norm", state)
        x = torch.cat([self.norm(f"{first}.input_layernorm", table[token]), normed])
        residual = normed if self.head.norm_before_residual else state
        h = self.feedforward(first, residual + self.attended(0, first, x))
        for i in range(1, self.head.num_layers):
            name = f"layers.{i}"
            h = self.feedforward(name, h + self.attended(i, name, self.norm(f"{name}.{self.head.later_norm}", h)))
        return self.norm("norm", h) if self.head.norm_output else h

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """The state (H,) at the newest of a row's ``tokens``."""
        states = self.model(torch.tensor([list(tokens[:-1])]), output_hidden_states=True).hidden_states
        state = torch.empty(0)
        for t, token in enumerate(tokens[1:]):
            state = self.step(token, self.first_state([s[0, t] for s in states], states[-1][0, t]))
        return state

    @torch.no_grad()
    def logits(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """(Vd,) after the drafted ``path`` below ``state``; what it adds to the keys is forgotten."""
        length = len(self.keys[0])
        for token in path:
            state = self.step(token, state)
        for stored in (*self.keys, *self.values):
            del stored[length:]
        x = state if self.head.norm_output else self.norm("norm", state)
        if self.head.output == "target's":
            return self.model.lm_head.weight @ x
        return self.tensors["embed_tokens.weight" if self.head.output == "tied" else "lm_head.weight"] @ x
