"""Models that accelerate offloads: their weights are on ``meta`` between calls, and loaded module by module in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from torch import Tensor
from trained import random_eagle, random_medusa, tiny_target
from transformers import LlamaForCausalLM
from zoo import FAMILIES

import specdec
from specdec.cpu.accelerate import accelerated
from specdec.drafters.heads.eagle_format import save_eagle
from specdec.drafters.heads.medusa_heads import save_medusa
from specdec.drafters.heads.shipped import target_facts
from specdec.engine.causal_lm import CausalLM
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row
from specdec.tree import TokenTree

VOCAB = 61
CPU = torch.device("cpu")
PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


def small() -> LlamaForCausalLM:
    return tiny_target(VOCAB, size=64)  # wide enough for packed layers


def dispatched(model: Any, folder: Path, *on_disk: str) -> Any:
    places = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "cpu and buffers": lambda model, folder: cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, str(folder), CPU),
    "output on disk": lambda model, folder: dispatched(model, folder, "lm_head"),
    "embeddings on disk": lambda model, folder: dispatched(model, folder, "model.embed_tokens"),
    "layers on disk": lambda model, folder: dispatched(model, folder, "model.layers"),
}
offloads = pytest.mark.parametrize("offload", OFFLOADS.values(), ids=list(OFFLOADS))


@pytest.fixture
def prompts() -> dict[str, Tensor]:
    ids = torch.tensor([[8, 9, 10, 8, 9, 10, 8, 9], [0, 0, 0, 0, 30, 31, 30, 31]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@offloads
@pytest.mark.parametrize(("drafter", "accelerate"), [("ngram", False), ("recycling", True), ("model", True)])
def test_an_offloaded_model_gives_the_text_of_generate(
    offload: Callable[[Any, Path], Any], drafter: str, accelerate: bool, prompts: dict[str, Tensor], tmp_path: Path
) -> None:
    """Ids were once sent to where the embeddings lie between calls, which is nowhere; and such layers were packed."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    expected = small().generate(**prompts, **settings)
    model = offload(small(), tmp_path / "target")
    draft_model = offload(small(), tmp_path / "draft") if drafter == "model" else None
    settings |= {"drafter": drafter, "draft_model": draft_model, "accelerate": accelerate, "adaptive": False}
    for _ in range(2):
        assert torch.equal(specdec.generate(model, **prompts, **settings), expected)
    assert any(parameter.is_meta for parameter in model.parameters()), "what was offloaded stays so"


@offloads
def test_heads_that_share_the_output_matrix_read_an_offloaded_one(
    offload: Callable[[Any, Path], Any], prompts: dict[str, Tensor], tmp_path: Path
) -> None:
    """A matrix on meta was copied into the head; and a trained head's target is known by its embeddings."""
    plain = small()
    save_eagle(random_eagle(plain, shares_output=True), tmp_path / "eagle")
    save_medusa(random_medusa(plain, list(range(40)), True), tmp_path / "medusa")
    facts = target_facts(plain)
    expected = plain.generate(**prompts, max_new_tokens=12, do_sample=False)
    model = offload(small(), tmp_path / "target")
    assert target_facts(model) == facts
    for drafter in ("eagle", "medusa"):
        spec = f"{drafter}:path={tmp_path / drafter}"
        out = specdec.generate(model, **prompts, drafter=spec, max_new_tokens=12, do_sample=False, adaptive=False)
        assert torch.equal(out, expected)


@offloads
def test_an_offloaded_model_is_not_packed(offload: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    model = offload(small(), tmp_path)
    assert accelerated(model) is model


def test_a_stored_mask_that_is_offloaded_is_read_all_the_same() -> None:
    """GPT-Neo's local attention is found by its mask, a buffer, which may be offloaded too."""
    model = cpu_offload(FAMILIES["gpt_neo-local"].build().float(), CPU, offload_buffers=True)
    assert "cache slots" in CausalLM(model).support.reason


def test_weights_that_nothing_loads_are_refused_in_a_sentence() -> None:
    with init_empty_weights():
        model = small()
    with pytest.raises(UnsupportedModelError, match=r"meta device, and nothing .* loads them .*from_pretrained"):
        specdec.generate(model, torch.tensor([[5, 9]]), max_new_tokens=4, pad_token_id=0)


def test_an_interrupted_pass_of_an_offloaded_model_does_not_end_its_use(tmp_path: Path) -> None:
    """accelerate leaves the weights of the module that failed in memory: the model is still the same one."""
    model = disk_offload(small(), str(tmp_path), CPU)
    expected = CausalLM(model)
    with pytest.raises((IndexError, RuntimeError)):
        model.model.embed_tokens(torch.tensor([[VOCAB]]))
    assert not model.model.embed_tokens.weight.is_meta
    interrupted = CausalLM(model)
    found = []
    for engine in (expected, interrupted, interrupted):
        row = Row(0, [9, 8, 3], 40)
        engine.open([row])
        found.append(engine.score([row], [TokenTree.chain(3, [4, 5])])[0].logits)
        engine.close([row])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
