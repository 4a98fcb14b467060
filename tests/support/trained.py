"""Tiny targets and random heads for tests of the trained drafters."""

from __future__ import annotations

from typing import TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.drafters.heads.eagle_cell import EagleCell, FeatureCell
from specdec.drafters.heads.eagle_config import EagleConfig
from specdec.drafters.heads.medusa_heads import MedusaHeads

Module = TypeVar("Module", bound=torch.nn.Module)


def tiny_target(
    vocab: int = 61, layers: int = 5, size: int = 32, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def randomized(module: Module, seed: int = 1) -> Module:
    """Weights large enough that an error shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            rng = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * rng if parameter.dim() > 1 else 1 + 0.3 * rng)
    return module


def eagle_config(model: LlamaForCausalLM, draft_vocab: int | None = None, **changes: object) -> EagleConfig:
    return EagleConfig.for_target(model.config, draft_vocab or model.config.vocab_size, **changes)


def random_eagle(
    model: LlamaForCausalLM, draft_vocab: list[int] | None = None, seed: int = 1, **changes: object
) -> EagleCell:
    ids = torch.tensor(draft_vocab) if draft_vocab else None
    return randomized(EagleCell(eagle_config(model, draft_vocab and len(draft_vocab), **changes), ids), seed)


def random_feature_cell(model: LlamaForCausalLM, layers: int = 1, fc_bias: bool = False, seed: int = 1) -> FeatureCell:
    return randomized(FeatureCell(eagle_config(model, None, num_hidden_layers=layers, fc_bias=fc_bias)), seed)


def random_medusa(
    model: LlamaForCausalLM,
    draft_vocab: list[int] | None = None,
    shares_output: bool = True,
    num_heads: int = 3,
    num_layers: int = 1,
) -> MedusaHeads:
    ids = torch.tensor(draft_vocab) if draft_vocab else None
    config = model.config
    return randomized(MedusaHeads(num_heads, num_layers, config.hidden_size, config.vocab_size, ids, shares_output))
