"""EAGLE's draft networks: the cell of EAGLE-3 (Li et al., 2025), and the layers of EAGLE-1 and 2 (Li et al., 2024).

Both read, for each position, the embedding of the next token and a state: at first one made of the target's features,
then their own output. Attention is the caller's: training unrolls it, drafting keeps a cache. State-dict keys are
those of the published layouts. Letters: B rows, T columns, H hidden size, D head size, G key-value heads, V target
vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.cpu.fused_layer import merged
from specdec.cpu.packed_linear import PackedLinear, pack, plain_weight
from specdec.drafters.heads.eagle_config import EagleConfig

# (layer, q (B, heads, T, D), k and v (B, G, T, D) of the new columns) -> attended (B, heads, T, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class _Attention(nn.Module):
    """The projections around attention."""

    def __init__(self, config: EagleConfig, in_size: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads, self.num_groups = config.num_attention_heads, config.num_key_value_heads
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(in_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(in_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(in_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.qkv: PackedLinear | None = None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, heads, T, D), k and v (B, G, T, D) from ``x`` (B, T, in size); ``cos`` and ``sin`` as of _Rotary."""
        projections = self.q_proj, self.k_proj, self.v_proj
        projected = self.qkv(x) if self.qkv else torch.cat([layer(x) for layer in projections], -1)
        heads = projected.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        turned, v = torch.split(heads, [self.num_heads + self.num_groups, self.num_groups], 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = torch.split(turned, [self.num_heads, self.num_groups], 1)
            turned = torch.cat([self.q_norm(q), self.k_norm(k)], 1)
        turned = turned * cos + turned.roll(self.head_dim // 2, -1) * sin
        q, k = torch.split(turned, [self.num_heads, self.num_groups], 1)
        return q, k, v

    def join(self, attended: Tensor) -> Tensor:
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class _MLP(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.gate_up: PackedLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.gate_up else (self.gate_proj(x), self.up_proj(x))
        out: Tensor = self.down_proj(self.activation(gate) * up)
        return out


class _Layer(nn.Module):
    """A decoder layer whose norms before attention (``norms``) differ from version to version."""

    input_layernorm: nn.RMSNorm
    hidden_norm: nn.RMSNorm
    post_attention_layernorm: nn.RMSNorm

    def __init__(self, config: EagleConfig, in_size: int, norms: tuple[str, ...]) -> None:
        super().__init__()
        self.self_attn = _Attention(config, in_size)
        self.mlp = _MLP(config)
        for name in (*norms, "post_attention_layernorm"):
            setattr(self, name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """(B, T, H): the layer's output, from its residual stream and what its heads attended to."""
        h = residual + self.self_attn.join(attended)
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out


class _Rotary(nn.Module):
    """Rotary embeddings in float32 whatever the weights' type: their frequencies are no buffer that a cast could round."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        rotary = LlamaRotaryEmbedding(config.llama())
        frequencies = rotary.inv_freq.float()
        self._frequencies = torch.cat((-frequencies, frequencies))
        self._scale = float(rotary.attention_scaling)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D) for ``positions`` (B, T): x cos + roll(x, D / 2) sin is x turned.

        The first half of the sines is negated, because the halves of x turn against each other.
        """
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions[:, None, :, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1:
            cos, sin = cos * self._scale, sin * self._scale
        return cos.to(dtype), sin.to(dtype)


class EagleCell(nn.Module):
    """EAGLE-3: r = h; a = attn(cat[input_layernorm(emb), hidden_norm(h)]); h = r + a; h += mlp; perhaps more layers.

    Published heads differ in four flags of their config: ``norm_before_fc`` and ``fc_norm`` norm the target's features
    together or one by one, ``norm_before_residual`` takes hidden_norm(h) as r, and with ``norm_output`` the next step
    reads what the output matrix reads.
    """

    has_output = True
    d2t: Tensor  # (Vd,) target id - draft id
    t2d: Tensor  # (V,) which target ids the draft vocabulary holds

    def __init__(self, config: EagleConfig, draft_vocab: Tensor | None = None) -> None:
        """``draft_vocab`` (Vd,) are target ids in rising order; None: the first Vd ids, until weights are loaded."""
        super().__init__()
        self.config = config
        self.num_layers = config.num_hidden_layers
        size, eps, number = config.hidden_size, config.rms_norm_eps, config.num_features
        width = config.target_hidden_size
        self.input_norm = nn.RMSNorm(number * width, eps) if config.norm_before_fc and number else None
        self.fc_norm = nn.ModuleList(nn.RMSNorm(width, eps) for _ in range(number)) if config.fc_norm else None
        self.fc = nn.Linear(number * width, size, bias=config.fc_bias) if number else None
        self.midlayer = _Layer(config, 2 * size, ("hidden_norm", "input_layernorm"))
        self.layers = nn.ModuleDict(
            {str(i): _Layer(config, size, ("input_layernorm",)) for i in range(1, self.num_layers)}
        )
        self.norm = nn.RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if config.has_embedding else None
        self.rotary = _Rotary(config)
        ids = torch.arange(config.draft_vocab_size) if draft_vocab is None else draft_vocab.long()
        if ids.shape != (config.draft_vocab_size,):
            raise ValueError(f"draft_vocab must hold {config.draft_vocab_size} ids, got shape {tuple(ids.shape)}")
        self.register_buffer("d2t", ids - torch.arange(len(ids)))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True))

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are stored in."""
        return self.norm.weight.dtype

    def fuse(self, features: Tensor) -> Tensor:
        """The first states (..., H), from the target's layers side by side (..., F), or its last state (..., H)."""
        if self.fc is None:
            return features
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        states: Tensor = self.fc(features)
        return states

    def forward(self, embeds: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """What the next step reads (B, T, H), from ``embeds`` and ``states`` (B, T, H) at ``positions`` (B, T)."""
        layer = self.midlayer
        normed = layer.hidden_norm(states)
        x = torch.cat([layer.input_layernorm(embeds), normed], -1)
        angles = self.rotary(positions, x.dtype)
        residual = normed if self.config.norm_before_residual else states
        h = layer.finish(residual, attend(0, *layer.self_attn.project(x, *angles)))
        for i, module in enumerate(self.layers.values(), 1):
            layer = cast(_Layer, module)
            h = layer.finish(h, attend(i, *layer.self_attn.project(layer.input_layernorm(h), *angles)))
        return self.norm(h) if self.config.norm_output else h

    def outputs(self, states: Tensor) -> Tensor:
        """(..., H) what the output matrix reads, from what ``forward`` returned."""
        return states if self.config.norm_output else self.norm(states)

    def logits(self, states: Tensor) -> Tensor:
        """(..., Vd) over the draft vocabulary."""
        out: Tensor = self.lm_head(self.outputs(states))
        return out

    def target_ids(self) -> Tensor:
        """(Vd,) the target's token id of each row of the logits."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)


class FeatureCell(nn.Module):
    """EAGLE-1 and 2: x = fc(cat[emb, f]) through decoder layers, the first without a norm at its input.

    It predicts the target's next last hidden state, whose logits are the target's own: it has no output matrix.
    """

    has_output = False

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.num_layers = config.num_hidden_layers
        self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            _Layer(config, size, () if i == 0 else ("input_layernorm",)) for i in range(self.num_layers)
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if config.has_embedding else None
        self.rotary = _Rotary(config)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's last hidden state as it is."""
        return features

    def forward(self, embeds: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The next states (B, T, H)."""
        h: Tensor = self.fc(torch.cat([embeds, states], -1))
        angles = self.rotary(positions, h.dtype)
        for i, module in enumerate(self.layers):
            layer = cast(_Layer, module)
            x = h if i == 0 else layer.input_layernorm(h)
            h = layer.finish(h, attend(i, *layer.self_attn.project(x, *angles)))
        return h

    def target_ids(self) -> Tensor:
        """(V,) every id."""
        return torch.arange(self.config.vocab_size, device=self.fc.weight.device)


def pack_cell(cell: EagleCell | FeatureCell) -> None:
    """Pack the linear layers of ``cell``, in place: for inference on a CPU. Those with one input become one product."""
    for module in list(cell.modules()):
        if isinstance(module, _Attention):
            module.qkv = module.qkv or _merged(module, "q_proj", "k_proj", "v_proj")
        elif isinstance(module, _MLP):
            module.gate_up = module.gate_up or _merged(module, "gate_proj", "up_proj")
    pack(cell)


def _merged(parent: nn.Module, *names: str) -> PackedLinear | None:
    """One packed layer for all of ``names`` below ``parent``; None if one of them cannot be packed."""
    fits = all(plain_weight(getattr(parent, name)) is not None for name in names)
    return merged(parent, names) if fits else None
