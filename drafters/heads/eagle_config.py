"""What an EAGLE head's config.json says, for EAGLE-3 and for EAGLE-1 and 2; what is not understood is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.drafters.heads.eagle_layouts import Layout, flattened
from specdec.drafters.heads.eagle_reading import FLAGS, NUM_FEATURES, SHARES_OUTPUT, read_fields
from specdec.drafters.heads.eagle_rope import ROPE_TYPES, head_rope
from specdec.errors import CheckpointError

ARCHITECTURE = "LlamaForCausalLMEagle3"
_QK_NORM_ARCHITECTURE = "Eagle3Qwen3ForCausalLM"
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "draft_vocab_size", "target_hidden_size", "num_hidden_layers", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """The sizes of a head. Flags that published configs leave out are inferred from a checkpoint's keys."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # the target's
    draft_vocab_size: int
    target_hidden_size: int
    rms_norm_eps: float = 1e-5
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = 2048
    num_hidden_layers: int = 1
    hidden_act: str = "silu"
    num_features: int = NUM_FEATURES  # layers of the target side by side; 0: its last hidden state, without fc
    feature_layers: tuple[int, ...] | None = None  # entries of hidden_states; None: those of EAGLE-3's paper
    norm_before_residual: bool = False  # the first layer's residual is the state after its norm
    norm_before_fc: bool = False  # one norm over all features
    fc_norm: bool = False  # a norm over each feature
    norm_output: bool = False  # the next step reads the state after the last norm
    qk_norm: bool = False  # queries and keys are normalised, head by head
    torch_dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of what joins the heads
    mlp_bias: bool = False
    fc_bias: bool = False
    has_embedding: bool = False  # an embedding of its own; otherwise the target's
    ties_output: bool = False  # its embedding is its output matrix, where it has no other
    shares_output: bool = False  # the target's output matrix at the draft vocabulary, not stored with the head

    @classmethod
    def for_target(cls, config: Any, draft_vocab_size: int, **changes: Any) -> EagleConfig:
        """A head of the same widths as the target with transformers' ``config``; ``changes`` are other fields."""
        config = config.get_text_config()
        size, heads = config.hidden_size, config.num_attention_heads
        eos = config.eos_token_id
        fields: dict[str, Any] = {
            "hidden_size": size,
            "intermediate_size": _size(config, "intermediate_size") or 4 * size,
            "num_attention_heads": heads,
            "num_key_value_heads": _size(config, "num_key_value_heads") or heads,
            "head_dim": _size(config, "head_dim") or size // heads,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": draft_vocab_size,
            "target_hidden_size": size,
            "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-5),
            "max_position_embeddings": _size(config, "max_position_embeddings") or 2048,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos[0] if isinstance(eos, list) else eos,
        }
        rope = getattr(config, "rope_parameters", None)
        if rope and "rope_theta" in rope:  # others are keyed by layer type: the head keeps plain ones
            fields["rope_parameters"] = head_rope(rope)
        return cls(**(fields | changes))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> EagleConfig:
        """From a config.json in any known layout (see ``eagle_layouts``); unknown keys are named in a warning.

        Raises:
            CheckpointError: an architecture, a size or a flag that is not understood.
        """
        return cls.from_layout(flattened(config))

    @classmethod
    def from_layout(cls, layout: Layout) -> EagleConfig:
        """As ``from_dict``."""
        config = cls(**read_fields(layout))
        config._check()
        return config

    def _check(self) -> None:
        """Refuse what no network can be made of."""
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} in the head's config.json must be at least 1, got {getattr(self, name)}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups or self.head_dim % 2:
            raise CheckpointError(
                "the head's config.json must have a multiple of num_key_value_heads as num_attention_heads and an even "
                f"head_dim, got {groups}, {heads} and {self.head_dim}"
            )
        kind = self.rope_parameters["rope_type"]
        for name, value, supported in (("hidden_act", self.hidden_act, ACT2FN), ("rope_type", kind, ROPE_TYPES)):
            if value not in supported:
                raise CheckpointError(f"{name} {value!r} in the head's config.json is not known to transformers")
        if self.feature_layers is not None and len(self.feature_layers) != self.num_features:
            raise CheckpointError(
                f"the head's config.json says num_aux_hidden_states {self.num_features}, but names "
                f"{len(self.feature_layers)} layers of the target"
            )
        if self.num_features == 0 and (self.norm_before_fc or self.fc_norm):
            raise CheckpointError(
                "the head's config.json says use_aux_hidden_state false, so there is no fc and no norm before it: "
                "norm_before_fc and fc_norm must be false"
            )
        try:
            frequencies = LlamaRotaryEmbedding(self.llama()).inv_freq
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, StrictDataclassError) as error:
            raise CheckpointError(
                f"positions cannot be made of the rope_parameters in the head's config.json: {error}"
            ) from None
        if len(frequencies) != self.head_dim // 2 or not bool(frequencies.isfinite().all()):
            raise CheckpointError(
                f"the rope_parameters in the head's config.json must give {self.head_dim // 2} finite frequencies (half of "
                f"head_dim), got {frequencies.tolist()[:4]}: check factor, rope_theta and the lengths of lists"
            )

    def flags(self) -> tuple[str, ...]:
        """The names of the flags of EAGLE-3's network that are set."""
        return tuple(name for name in FLAGS if getattr(self, name))

    def unusual(self) -> tuple[str, ...]:
        """What sets the head apart from EAGLE-3's paper, by the names of config keys: not every engine reads it."""
        features = {
            "num_hidden_layers": self.num_hidden_layers > 1,
            "use_aux_hidden_state": self.num_features == 0,
            "eagle_aux_hidden_state_layer_ids": self.feature_layers is not None,
            "qk_norm": self.qk_norm,
            "attention_bias": self.attention_bias and self.output_bias,
            "a bias of q_proj or o_proj alone": self.attention_bias != self.output_bias,
            "mlp_bias": self.mlp_bias,
            "bias": self.fc_bias,
        }
        return (*self.flags(), *(name for name, holds in features.items() if holds))

    def to_dict(self) -> dict[str, Any]:
        """The config.json of the EAGLE-3 layout that serving engines read."""
        return {
            "architectures": [_QK_NORM_ARCHITECTURE if self.qk_norm else ARCHITECTURE],
            "model_type": "qwen3" if self.qk_norm else "llama",
            "hidden_size": self.hidden_size,
            "target_hidden_size": self.target_hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act,
            "attention_bias": self.attention_bias,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_parameters["rope_theta"],
            "rope_parameters": dict(self.rope_parameters),
            **self._rope_scaling(),
            "max_position_embeddings": self.max_position_embeddings,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "tie_word_embeddings": False,
            "norm_before_residual": self.norm_before_residual,
            "torch_dtype": self.torch_dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            **{name: True for name in (*self.flags(), "mlp_bias") if getattr(self, name)},
            **({"bias": True} if self.fc_bias else {}),
            **self._layers(),
            **({SHARES_OUTPUT: True} if self.shares_output else {}),
        }

    def _layers(self) -> dict[str, Any]:
        """Which layers of the target the head reads, in each engine's own count; nothing where all agree."""
        if self.num_features == 0:
            return {"eagle_config": {"use_aux_hidden_state": False}}
        if self.feature_layers is None:
            return {}
        return {
            "num_aux_hidden_states": self.num_features,
            "eagle_aux_hidden_state_layer_ids": list(self.feature_layers),  # vLLM: 0 is the embeddings
            "eagle_config": {  # SGLang: 0 is what layer 0 puts out
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in self.feature_layers],
            },
        }

    def _rope_scaling(self) -> dict[str, Any]:
        """What readers of older configs look for where positions are scaled: without it they scale none, in silence."""
        if self.rope_parameters.get("rope_type", "default") == "default":
            return {}
        return {"rope_scaling": {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}}

    def llama(self) -> LlamaConfig:
        """What transformers' rotary embeddings are made from."""
        return LlamaConfig(
            hidden_size=self.num_attention_heads * self.head_dim,  # a head's own may be no multiple
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope_parameters),
        )


def _size(config: Any, name: str) -> int | None:
    """A size of a target's config; None if it has none of that name, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' own, where layers differ
        return None
    return value if isinstance(value, int) else None
