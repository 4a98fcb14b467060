"""The keys of an EAGLE head's config.json: none is passed over in silence.

A key is read; or it cannot matter to drafts; or it is refused by name unless its value is the one that stands for "not
used". Of any other key it is not known what it does: a value that switches something on is named in a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from specdec.errors import CheckpointError

# How the head was made or is stored, who reads it, how it is trained or served: nothing of the network.
_NO_INFLUENCE = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation",
    "auto_map", "chunk_size_feed_forward", "embed_requires_grad", "gradient_checkpointing", "has_lm_head",
    "has_no_defaults_at_init", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "max_window_layers", "modal_type", "model_type", "output_attentions", "output_hidden_states",
    "parallel_draft_heads_num_layers", "pretraining_tp", "problem_type", "return_dict", "sliding_window",
    "speculators_config", "speculators_model_type", "speculators_version", "specdec_target", "target_model_type",
    "transformers_version", "use_cache", "use_return_dict",
))  # fmt: skip
_NO_INFLUENCE_ENDS = ("_dropout", "dropout_rate", "_token_id", "_token_index")

_PARALLEL = "a head that drafts several tokens in one pass, from a mask token, is another network"
# What the network would have to be, and the values at which it is not.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_sliding_window": ((False,), "the head's attention sees the whole text"),
    "is_causal": ((True,), "the head's attention looks back only"),
    "position_embedding_type": (("rope",), "positions are rotary"),
    "rope_interleave": ((False,), "pairs (i, i + D / 2) are turned"),
    "rope_interleaved": ((False,), "pairs (i, i + D / 2) are turned"),
    "use_rotary_pos_emb": ((True,), "positions are rotary"),
    "norm_type": (("rms", "rmsnorm"), "norms are RMSNorm"),
    "use_last_layernorm": ((True,), "a norm stands before the output matrix"),
    "use_input_layernorm_in_first_layer": ((True,), "embeddings are normalised"),
    "use_mtp_layernorm": ((False,), "these norms are not part of EAGLE"),
    "layernorms": ((False,), "these norms are not part of EAGLE-1"),
    "transformer_layer_architecture": (("auto", "LlamaDecoderLayer"), "the layer is Llama's"),
    "early_stop_method": ((), "rows of fc that are no state are not known"),
    "parallel_drafting": ((False,), _PARALLEL),
    "parallel_draft_step": ((0, 1), _PARALLEL),
    "mask_token_id": ((), _PARALLEL),
    "pard_token": ((), _PARALLEL),
    "ptd_token_id": ((), _PARALLEL),
    "quantization_config": ((), "weights are read as they are"),
    "compression_config": ((), "weights are read as they are"),
    "logit_scale": ((1,), "logits are not scaled"),
    "logits_scaling": ((1,), "logits are not scaled"),
    "final_logit_softcapping": ((), "logits are not capped"),
    "attn_logit_softcapping": ((), "attention is not capped"),
    "query_pre_attn_scalar": ((), "attention is scaled by the root of head_dim"),
    "attention_multiplier": ((), "attention is scaled by the root of head_dim"),
    "embedding_multiplier": ((1,), "embeddings are not scaled"),
    "residual_multiplier": ((1,), "residuals are not scaled"),
}


class Keys:
    """A config.json that remembers which of its keys were read; None counts as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self._read = values, set[str]()

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def flag(self, *names: str) -> bool:
        """Whether one of ``names`` is set; absent: not.

        Raises:
            CheckpointError: neither true nor false.
        """
        values = {name: self.get(name, False) for name in names}
        for name, value in values.items():
            if value not in (False, True):
                raise CheckpointError(f"{name} in the head's config.json must be true or false, got {value!r}")
        return any(values.values())

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number.

        Raises:
            CheckpointError: absent without a default, or no whole number.
        """
        value = self.get(name, default)
        if value is None:
            raise CheckpointError(f"the head's config.json lacks {name}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise CheckpointError(f"the head's config.json holds a value that is no size: {name} = {value!r}")
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A number.

        Raises:
            CheckpointError: something else.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{name} in the head's config.json must be a number, got {value!r}")
        return float(value)

    def check_rest(self) -> None:
        """Judge the keys that nobody read.

        Raises:
            CheckpointError: a key says that the network is one that is not known here.
        """
        rest = {key: value for key, value in self._values.items() if key not in self._read and value is not None}
        for key, value in rest.items():
            neutral, why = _ONLY.get(key, ((value,), ""))
            if value not in neutral:
                raise refused(key, value, why, neutral)
        unknown = {key: value for key, value in rest.items() if key not in _ONLY and _may_matter(key, value)}
        if unknown:
            listed = ", ".join(f"{key} = {value!r}" for key, value in unknown.items())
            warnings.warn(
                f"the head's config.json says {listed}, which is not known here and is not used: if it changes the head's "
                "network, its drafts are poor (compare their acceptance with what its authors report)",
                stacklevel=2,
            )


def refused(key: str, value: object, why: str, supported: tuple[Any, ...] = ()) -> CheckpointError:
    """The error for a key whose value is not supported."""
    allowed = " or ".join(map(repr, supported)) or "null"
    return CheckpointError(
        f"{key} = {value!r} in the head's config.json is not supported: {why}, so {key} must be {allowed}; use a head "
        "without it, or train one with specdec train eagle"
    )


def _may_matter(key: str, value: object) -> bool:
    is_known = key in _NO_INFLUENCE or key.endswith(_NO_INFLUENCE_ENDS)
    return not is_known and bool(value)
