"""A cell begins with what the target's last layer computes, whatever that layer's parts are called and store."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import FAMILIES

from specdec.drafters.heads.eagle_cell import EagleCell
from specdec.drafters.heads.eagle_config import EagleConfig
from specdec.drafters.training.eagle import unrolled_attention
from specdec.drafters.training.warm_start import norm_scale, warm_start
from specdec.engine.hidden_states import decoder_layers

SIZE = 32
# The norm before the feed-forward part; Gemma's norms multiply by 1 + weight, and later ones have two more norms.
BEFORE_MLP = {
    "llama": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "gemma": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
}
TARGETS = [name for name, family in FAMILIES.items() if family.support != "refused"]

pytestmark = pytest.mark.usefixtures("one_thread")


def started(name: str) -> tuple[EagleCell, Any, bool]:
    """A cell, its target and whether the whole layer fitted."""
    model = FAMILIES[name].build().float()
    config = model.config.get_text_config()
    cell = EagleCell(EagleConfig.for_target(config, config.vocab_size))
    return cell, model, warm_start(cell, model)


@pytest.mark.parametrize("name", BEFORE_MLP)
@torch.no_grad()
def test_the_cells_norms_compute_what_the_targets_do(name: str) -> None:
    cell, model, fitted = started(name)
    layer, ours = decoder_layers(model)[-1], cell.midlayer
    pairs = [
        (ours.input_layernorm, layer.input_layernorm),
        (ours.hidden_norm, layer.input_layernorm),
        (ours.post_attention_layernorm, getattr(layer, BEFORE_MLP[name])),
        (cell.norm, model.get_decoder().norm),
    ]
    x = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(0))
    for norm, theirs in pairs:
        torch.testing.assert_close(norm(x), theirs(x), rtol=1e-5, atol=1e-5)
    stores_an_offset = not torch.allclose(cell.norm.weight, model.get_decoder().norm.weight, atol=0.5)
    assert stores_an_offset == name.startswith("gemma")
    assert fitted


@torch.no_grad()
def test_weights_that_are_stored_as_the_cell_stores_them_are_copied_bit_for_bit() -> None:
    cell, model, _ = started("llama")
    layer, ours = decoder_layers(model)[-1], cell.midlayer
    assert torch.equal(ours.hidden_norm.weight, layer.input_layernorm.weight)
    assert torch.equal(cell.norm.weight, model.model.norm.weight)
    assert torch.equal(ours.mlp.up_proj.weight, layer.mlp.up_proj.weight)
    assert torch.equal(ours.self_attn.q_proj.weight[:, :SIZE] * 2, layer.self_attn.q_proj.weight)
    assert torch.equal(cell.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_every_family_that_can_be_a_target_gives_a_cell(name: str) -> None:
    """Configs name their sizes in many ways, some give one for each layer, and some have none at all."""
    cell, _, _ = started(name)
    x = torch.randn(1, 5, SIZE)
    states = cell(x, x, torch.arange(5)[None], lambda _, q, k, v: unrolled_attention(q, [k], [v]))
    assert cell.logits(states).isfinite().all()


@torch.no_grad()
def test_the_scale_of_a_norm_is_found_without_its_bias() -> None:
    norm = nn.LayerNorm(SIZE)
    norm.weight.normal_()
    norm.bias.normal_()
    scale = norm_scale(norm, SIZE)
    assert scale is not None
    torch.testing.assert_close(scale, norm.weight)
    assert torch.equal(norm_scale(nn.RMSNorm(SIZE, elementwise_affine=False), SIZE), torch.ones(SIZE))


@pytest.mark.parametrize(
    "module", [None, nn.Identity(), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 5), nn.GELU(), nn.Dropout(0.0)], ids=str
)
def test_what_is_no_norm_has_no_scale(module: nn.Module | None) -> None:
    assert norm_scale(module, SIZE) is None
