"""Many requests on a tiny model: prompts with and without a common beginning, and what each gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.serving.engine import Engine
from specdec.serving.request import RequestSettings

VOCAB = 64
NUM_NEW = 24
SEED = 7
SETTINGS = {
    0.0: RequestSettings(max_new_tokens=NUM_NEW, stop_token_ids=()),
    1.0: RequestSettings(max_new_tokens=NUM_NEW, stop_token_ids=(), temperature=1.0, seed=SEED),
}


@cache
def crowd_model(seed: int = 0) -> LlamaForCausalLM:
    """Weights large enough for texts that differ, and repeat themselves here and there."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.06,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


BYTES_PER_TOKEN = 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, their size, float32


def crowd(seed: int = 1, num_alone: int = 6, num_alike: int = 5, common: int = 40) -> list[list[int]]:
    """Prompts of 1 to 60 tokens, and some that begin with the same ``common`` ones."""
    rng = random.Random(seed)

    def text(size: int) -> list[int]:
        return [rng.randrange(1, VOCAB) for _ in range(size)]

    beginning = text(common)
    return [text(rng.randrange(1, 60)) for _ in range(num_alone)] + [
        beginning + text(rng.randrange(1, 9)) for _ in range(num_alike)
    ]


@cache
def alone(prompt: tuple[int, ...], temperature: float, num_new: int = NUM_NEW) -> list[int]:
    """What ``generate()`` makes of one prompt without drafts."""
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "seed": SEED}
    ids = specdec.generate(crowd_model(), torch.tensor([prompt]), drafter="none", max_new_tokens=num_new, **sampling)
    tokens: list[int] = ids[0, len(prompt) :].tolist()
    return tokens


@dataclass(frozen=True, slots=True)
class Case:
    """How an engine is set up."""

    drafter: str = "ngram"
    block_size: int = 16
    num_blocks: int = 100
    sharing: bool = True
    budget: int = 48
    verifier: str = "match"
    adaptive: bool = True

    def __str__(self) -> str:
        sharing = "sharing" if self.sharing else "apart"
        return f"{self.drafter}-{self.block_size}x{self.num_blocks}-{sharing}-{self.budget}"


@contextmanager
def engine(case: Case, **options: Any) -> Iterator[Engine]:
    """An engine on the crowd's model; its tree of prefixes is all that holds blocks in the end."""
    draft = crowd_model() if "model" in case.drafter else None
    memory = case.num_blocks * case.block_size * BYTES_PER_TOKEN * (1 if draft is None else 2)
    arguments = {"max_rows": 4, "accelerate": False, "token_budget": case.budget, "prefix_sharing": case.sharing}
    with Engine(
        crowd_model(), drafter=case.drafter, verifier=case.verifier, draft_model=draft, kv_memory=memory,
        block_size=case.block_size, adaptive=case.adaptive, **(arguments | options),
    ) as made:  # fmt: skip
        yield made
    tables = made._scheduler.tables
    if tables.tree is not None:
        tables.tree.clear()
    assert tables.pool.num_free == tables.pool.num_blocks == case.num_blocks


def differing(made: Engine, prompts: Sequence[Sequence[int]], temperatures: Sequence[float] = (0.0, 1.0)) -> list[Any]:
    """The prompts whose answers from ``made``, all asked for at once, are not what they are alone."""
    asked = [(tuple(prompt), temperature) for temperature in temperatures for prompt in prompts]
    handles = [made.submit(prompt, SETTINGS[temperature]) for prompt, temperature in asked]
    return [
        (prompt, temperature)
        for handle, (prompt, temperature) in zip(handles, asked, strict=True)
        if handle.result(60).tokens != alone(prompt, temperature)
    ]
