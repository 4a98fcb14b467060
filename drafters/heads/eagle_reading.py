"""The fields of an EagleConfig, read key by key from a config.json in the flat form."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, Qwen3Config

from specdec.drafters.heads.eagle_keys import Keys, refused
from specdec.drafters.heads.eagle_layouts import Layout
from specdec.drafters.heads.eagle_rope import read_rope

NUM_FEATURES = 3
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")  # of EAGLE-3's network
SHARES_OUTPUT = "specdec_shares_output"  # our own: other engines need the matrix


def read_fields(layout: Layout) -> dict[str, Any]:
    """What ``layout`` says, and transformers' usual values where it says nothing.

    Raises:
        CheckpointError: a key is missing, holds no number, or asks for a network that is not known here.
    """
    keys = Keys(layout.values)
    fields = _sizes(keys) | _features(keys, layout) | {name: keys.flag(name) for name in FLAGS[:2]}
    fields |= {
        "fc_norm": keys.flag("fc_norm", "use_aux_norm"),  # SGLang's name for it was another
        "norm_output": keys.flag("norm_output"),
        "qk_norm": bool(layout.has_qk_norm),
        "hidden_act": str(keys.get("hidden_act", "silu")),
        "rope_parameters": read_rope(keys),
        "attention_bias": keys.flag("attention_bias", "qkv_bias"),
        "mlp_bias": keys.flag("mlp_bias"),
        "fc_bias": keys.flag("bias", "fusion_bias"),
        "ties_output": keys.flag("tie_word_embeddings"),
        "shares_output": keys.flag(SHARES_OUTPUT),
        "torch_dtype": str(keys.get("torch_dtype", keys.get("dtype", "float32"))),
        "bos_token_id": keys.get("bos_token_id"),
        "eos_token_id": keys.get("eos_token_id"),
    }
    kinds = keys.get("layer_types", [])[: fields["num_hidden_layers"]]
    if any(kind != "full_attention" for kind in kinds):
        raise refused("layer_types", kinds, "the head's attention sees the whole text", (["full_attention"],))
    if kinds:
        keys.flag("use_sliding_window")  # then it decides nothing
    keys.check_rest()
    return fields


def _sizes(keys: Keys) -> dict[str, Any]:
    size, heads, vocab_size = (keys.size(name) for name in ("hidden_size", "num_attention_heads", "vocab_size"))
    is_qwen3 = keys.get("model_type") == "qwen3"
    usual = Qwen3Config() if is_qwen3 else LlamaConfig()
    return {
        "hidden_size": size,
        "intermediate_size": keys.size("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("num_key_value_heads", heads),
        "head_dim": keys.size("head_dim", usual.head_dim if is_qwen3 else size // max(heads, 1)),
        "vocab_size": vocab_size,
        "draft_vocab_size": keys.size("draft_vocab_size", vocab_size),
        "target_hidden_size": keys.size("target_hidden_size", size),
        "num_hidden_layers": keys.size("num_hidden_layers", 1),
        "rms_norm_eps": keys.number("rms_norm_eps", usual.rms_norm_eps),
        "max_position_embeddings": keys.size("max_position_embeddings", 2048),
    }


def _features(keys: Keys, layout: Layout) -> dict[str, Any]:
    usual = len(layout.feature_layers or ()) or NUM_FEATURES
    number = keys.size("num_aux_hidden_states", usual)
    return {"num_features": 0 if layout.reads_last_only else number, "feature_layers": layout.feature_layers}
