"""Tiny random models of every family that the engine claims to verify, or to refuse.

Weights have a standard deviation of 0.15, so that a wrong mask or position moves logits by 0.1 and more; the window is
8 and prompts are longer, so that windows cut. float64 leaves rounding far below any real error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

VOCAB = 97
WINDOW = 8
EXACT = 1e-9  # float64 throughout: measured errors are 4e-15
# Some part runs in float32 whatever the model's dtype: RMS norms, the softmax of eager attention, routers, the rotary
# embedding of Llama 4. Rounding there can turn a difference of 1e-15 into one of 1e-6; a wrong mask makes it 0.5.
ROUNDED = 1e-5

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA, "head_dim": 8}
_MOE = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# As many layers as the text model: a search for "the list of 4 layers" finds these first.
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LLAMA4 = {
    **_GEMMA,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": WINDOW,
    "layer_types": ["chunked_attention", "full_attention"] * 2,
}
_ALIBI = {"max_position_embeddings": None}  # these configs have no such entry
_ALTERNATING = ["sliding_attention", "full_attention"] * 2


@dataclass(frozen=True, slots=True)
class Family:
    """One configuration: how to build it and what the engine must make of it."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    support: str = "tree"  # or "chain", "refused"
    tolerance: float = ROUNDED
    vision: dict[str, Any] | None = None  # of a vision-language model, which is used for text alone
    reason: str = ""  # a word that must stand in the reason for chain-only and refused families

    def build(self, **changes: Any) -> Any:
        """A model with random weights, the same for each call; ``changes`` override options of its config."""
        options = {**_SMALL, **self.options, **changes}
        if self.vision is not None:
            options = {"text_config": options, "vision_config": self.vision}
        config = AutoConfig.for_model(self.model_type, **options)
        auto = AutoModelForCausalLM
        if self.vision is not None:
            auto = AutoModelForImageTextToText
        elif config.is_encoder_decoder:
            auto = AutoModelForSeq2SeqLM
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation=self.attention, dtype=torch.float64).eval()
        # Grouped matrix products of the default have no float64.
        model.set_experts_implementation("eager")
        randomize(model)
        return model


def randomize(model: torch.nn.Module) -> None:
    """Large enough weights that errors show, and biases and norms that differ from zero and one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            rng = 0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(rng)
            else:
                parameter.add_(rng)


def _windowed(name: str, model_type: str, options: dict[str, Any], **fields: Any) -> Family:
    return Family(name, model_type, {**options, "sliding_window": WINDOW}, **fields)


TREE = [
    Family("llama", "llama", _LLAMA),
    Family("llama-eager", "llama", _LLAMA, attention="eager"),
    Family("mistral", "mistral", {**_LLAMA, "sliding_window": None}),
    _windowed("mistral-window", "mistral", _LLAMA),
    _windowed("mistral-window-eager", "mistral", _LLAMA, attention="eager"),
    Family("phi3", "phi3", {**_LLAMA, "sliding_window": None}),
    _windowed("phi3-window", "phi3", _LLAMA),
    _windowed("starcoder2-window", "starcoder2", _LLAMA, tolerance=EXACT),
    Family("qwen2", "qwen2", _LLAMA),
    _windowed("qwen2-window", "qwen2", {**_LLAMA, "use_sliding_window": True, "max_window_layers": 2}),
    Family("qwen3", "qwen3", _GEMMA),
    _windowed("qwen3-window", "qwen3", {**_GEMMA, "use_sliding_window": True, "max_window_layers": 2}),
    _windowed("ministral", "ministral", {**_GEMMA, "layer_types": _ALTERNATING}),
    _windowed("olmo3", "olmo3", {**_LLAMA, "layer_types": _ALTERNATING}),
    _windowed("exaone4", "exaone4", {**_GEMMA, "layer_types": _ALTERNATING}),
    _windowed("cohere2", "cohere2", {**_GEMMA, "layer_types": _ALTERNATING, "logit_scale": 1.0}),
    Family("smollm3", "smollm3", _LLAMA),
    Family("gemma", "gemma", _GEMMA),
    _windowed("gemma2", "gemma2", _GEMMA, attention="eager"),
    _windowed("gemma3", "gemma3_text", {**_GEMMA, "layer_types": _ALTERNATING}),
    _windowed(
        "gemma3n",
        "gemma3n_text",
        {
            **_GEMMA,
            "layer_types": _ALTERNATING,
            "intermediate_size": [48] * 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    _windowed(
        "gemma4",
        "gemma4_text",
        {
            **_GEMMA,
            "layer_types": _ALTERNATING,
            "global_head_dim": 16,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        },
    ),
    Family("phi", "phi", _LLAMA, tolerance=EXACT),
    Family("gpt2", "gpt2", tolerance=EXACT),
    Family("gpt_neox", "gpt_neox", {"intermediate_size": 48}, tolerance=EXACT),
    Family("opt", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}, tolerance=EXACT),
    Family("gptj", "gptj", {"rotary_dim": 4}, attention="eager"),
    Family("codegen", "codegen", {"rotary_dim": 4}, attention="eager"),
    Family("falcon-rotary", "falcon", {"alibi": False}, tolerance=EXACT),
    Family("olmo2", "olmo2", _LLAMA),
    Family("granite", "granite", _LLAMA),
    Family("stablelm", "stablelm", _LLAMA, tolerance=EXACT),
    Family("glm4", "glm4", _GEMMA),
    Family("cohere", "cohere", {**_LLAMA, "logit_scale": 1.0}),
    _windowed(
        "gpt_oss",
        "gpt_oss",
        {
            **_GEMMA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _ALTERNATING,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        attention="eager",
    ),
    Family("mixtral", "mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("qwen2_moe", "qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 24}),
    Family("qwen3_moe", "qwen3_moe", {**_MOE, "head_dim": 8}),
    Family(
        "deepseek_v3",
        "deepseek_v3",
        {
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    Family("llama4", "llama4_text", _LLAMA4),
    _windowed("gemma3-vision", "gemma3", {**_GEMMA, "layer_types": _ALTERNATING}, vision=_VISION),
    Family("llava", "llava", {**_LLAMA, "model_type": "llama"}, vision={**_VISION, "model_type": "clip_vision_model"}),
    Family(
        "qwen2_5_vl",
        "qwen2_5_vl",
        {**_LLAMA, "rope_parameters": _MROPE},
        vision={"depth": 4, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16, "num_heads": 2},
    ),
    Family(
        "llama4-vision",
        "llama4",
        _LLAMA4,
        vision={
            **_VISION,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    ),
]

CHAIN = [
    Family("bloom", "bloom", _ALIBI, attention="eager", support="chain", reason="position_ids"),
    Family(
        "falcon-alibi",
        "falcon",
        {"alibi": True},
        attention="eager",
        tolerance=EXACT,
        support="chain",
        reason="fails on a small tree",
    ),
    Family(
        "mpt",
        "mpt",
        {**_ALIBI, "max_seq_len": 256},
        attention="eager",
        support="chain",
        reason="position_ids",
    ),
    Family(
        "gpt_neo-local",
        "gpt_neo",
        {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
        attention="eager",
        support="chain",
        reason="cache slots",
    ),
]

REFUSED = [
    Family("mamba", "mamba", attention="eager", support="refused", reason="state"),
    Family(
        "jamba",
        "jamba",
        {**_LLAMA, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2},
        support="refused",
        reason="state",
    ),
    Family(
        "lfm2", "lfm2", {**_LLAMA, "layer_types": ["conv", "full_attention"] * 2}, support="refused", reason="state"
    ),
    Family(
        "qwen3_next",
        "qwen3_next",
        {
            **_MOE,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
        support="refused",
        reason="state",
    ),
    Family("rwkv", "rwkv", {"attention_hidden_size": 32}, attention="eager", support="refused", reason="state"),
    Family(
        "t5",
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        support="refused",
        reason="encoder-decoder",
    ),
]

FAMILIES = {family.name: family for family in (*TREE, *CHAIN, *REFUSED)}
