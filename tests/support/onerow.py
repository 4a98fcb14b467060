"""A tiny random model and single steps of one row, for tests of drafters without a network."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.interfaces import Drafter, Limit, Row
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY
from specdec.tree import TokenTree

VOCAB = 61
NOISE = PhiloxRng(0)


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batch(*rows: list[int]) -> dict[str, Tensor]:
    """Inputs of generate(), padded at the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def propose(d: Drafter, row: Row, depth: int = 8, nodes: int = 8, chain_only: bool = False) -> TokenTree:
    (tree,) = d.propose([row], [Limit(depth, nodes, chain_only)], GREEDY, NOISE)
    return tree
