"""Tiny models of the families whose attention the kernels take over."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "gemma2, window and softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=64, attn_logit_softcapping=2.0)
    ),
    "gpt-oss, window and sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)
    ),
}
