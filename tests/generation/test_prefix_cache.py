"""Calls of generate() that share what they computed give what they give alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crowd import crowd
from tinyllama import tiny

import specdec
from specdec.errors import OutOfBlocksError, UnsupportedOptionError


def ids(*prompts: list[int]) -> torch.Tensor:
    return torch.tensor([[token % 50 + 3 for token in prompt] for prompt in prompts])


PROMPT = crowd()[-1][:36]


@pytest.mark.parametrize("drafter", ["none", "hybrid", "model:shape=best-first"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3, "top_k": 20}], ids=["greedy", "sampled"])
def test_calls_that_share_prefixes_give_the_same(drafter: str, sampling: dict[str, Any]) -> None:
    model = tiny(0)
    draft = {"draft_model": tiny(1)} if "model" in drafter else {}
    options = {"drafter": drafter, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None, **draft, **sampling}
    cache = specdec.PrefixCache("4MB")
    prompts = [ids(PROMPT), ids(PROMPT, PROMPT[::-1]), ids([*PROMPT[:20], 9, 9, 9]), ids(PROMPT)]
    for prompt in prompts:
        assert torch.equal(
            specdec.generate(model, prompt, prefix_cache=cache, **options), specdec.generate(model, prompt, **options)
        )
    assert cache.num_tokens > 100


def num_read(model: Any, prompt: torch.Tensor, **options: Any) -> int:
    """Tokens that the model processed."""
    count = 0

    def see(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += (args[0] if args else kwargs["input_ids"]).numel()

    handle = model.model.register_forward_pre_hook(see, with_kwargs=True)
    specdec.generate(model, prompt, drafter="none", max_new_tokens=4, eos_token_id=None, **options)
    handle.remove()
    return count


def test_what_is_known_is_not_computed_again() -> None:
    model, cache = tiny(0), specdec.PrefixCache("1MB")
    specdec.generate(model, ids([1, 2]), prefix_cache=cache, drafter="none", max_new_tokens=1)  # the probe
    first = num_read(model, ids(PROMPT), prefix_cache=cache)
    assert first == num_read(model, ids(PROMPT)) == len(PROMPT) + 3
    assert num_read(model, ids(PROMPT), prefix_cache=cache) == 4
    assert num_read(model, ids([*PROMPT, 7, 8]), prefix_cache=cache) <= 7
    cache.clear()
    assert cache.num_tokens == 0
    assert num_read(model, ids(PROMPT), prefix_cache=cache) >= first


@pytest.mark.parametrize("change", ["counted", "uncounted"])
def test_changed_weights_are_noticed(change: str) -> None:
    model, cache = tiny(0), specdec.PrefixCache("1MB")
    options = {"drafter": "none", "max_new_tokens": 12, "eos_token_id": None}
    specdec.generate(model, ids(PROMPT), prefix_cache=cache, **options)
    weight = model.model.layers[0].self_attn.k_proj.weight
    (weight.data if change == "uncounted" else weight.detach()).mul_(-1.5)
    assert torch.equal(
        specdec.generate(model, ids(PROMPT), prefix_cache=cache, **options),
        specdec.generate(model, ids(PROMPT), **options),
    )


def test_bad_caches() -> None:
    model, cache = tiny(0), specdec.PrefixCache(20_000)
    specdec.generate(model, ids([1]), prefix_cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="belongs to another model"):
        specdec.generate(tiny(0), ids([1]), prefix_cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"prefix_cache must be a specdec\.PrefixCache, got 3"):
        specdec.generate(model, ids([1]), prefix_cache=3, max_new_tokens=2)  # type: ignore[arg-type]
    with pytest.raises(OutOfBlocksError, match="give it more memory"):
        specdec.generate(model, ids(PROMPT * 8), prefix_cache=cache, max_new_tokens=2)
    assert specdec.generate(model, ids([1]), prefix_cache=cache, max_new_tokens=2).shape == (1, 3)  # all were freed
    with pytest.raises(UnsupportedOptionError, match="cuda_graphs"):
        specdec.generate(model, ids([1]), prefix_cache=cache, cuda_graphs=True)
    with pytest.raises(ValueError, match="block_size"):
        specdec.PrefixCache(block_size=0)
    with pytest.raises(ValueError, match="kv_memory"):
        specdec.PrefixCache("much")
