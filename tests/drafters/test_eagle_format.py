"""EAGLE checkpoints: published layouts load, and everything that does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eagle_files import CONFIG, IDS, VD, D, H, I, Tensors, V, eagle1, eagle3, write
from safetensors.torch import load_file
from torch import Tensor

from specdec.drafters.heads.eagle_cell import EagleCell, FeatureCell
from specdec.drafters.heads.eagle_config import EagleConfig
from specdec.drafters.heads.eagle_engine import share_output
from specdec.drafters.heads.eagle_format import load_eagle, save_eagle
from specdec.errors import CheckpointError


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("spelling", ["midlayer.", "layers.0."])
def test_eagle3_loads_in_both_spellings(tmp_path: Path, spelling: str, suffix: str) -> None:
    tensors = eagle3()
    spelled = {key.replace("midlayer.", spelling): value for key, value in tensors.items()}
    cell = load_eagle(write(tmp_path, spelled, suffix), H, V)
    assert isinstance(cell, EagleCell)
    assert cell.target_ids().tolist() == IDS.tolist()
    assert cell.config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    state = cell.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key], value) for key, value in tensors.items())


def test_a_full_draft_vocabulary_needs_no_mapping_and_an_embedding_may_come_along(tmp_path: Path) -> None:
    tensors = eagle3() | {"lm_head.weight": torch.randn(V, H), "embed_tokens.weight": torch.randn(V, H)}
    del tensors["d2t"], tensors["t2d"]
    cell = load_eagle(write(tmp_path, tensors, draft_vocab_size=V), H, V)
    assert cell.target_ids().tolist() == list(range(V))
    assert cell.embed_tokens is not None
    assert torch.equal(cell.embed_tokens.weight, tensors["embed_tokens.weight"])


@pytest.mark.parametrize(("layers", "bias"), [(1, False), (1, True), (2, False)])
def test_eagle1_loads_with_layers_and_bias_from_its_keys(tmp_path: Path, layers: int, bias: bool) -> None:
    tensors = eagle1(layers, bias)
    cell = load_eagle(
        write(tmp_path, tensors, "bin", architectures=["LlamaForCausalLM"], num_hidden_layers=layers), H, V
    )
    assert isinstance(cell, FeatureCell)
    assert cell.state_dict().keys() == tensors.keys()


def test_what_was_saved_loads_bit_equal_and_has_the_documented_config(tmp_path: Path) -> None:
    cell = EagleCell(EagleConfig.from_dict(CONFIG), IDS).bfloat16()
    save_eagle(cell, tmp_path / "head", {"hidden_size": H})
    loaded = load_eagle(tmp_path / "head", H, V).state_dict()
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in cell.state_dict().items())
    stored = load_file(tmp_path / "head" / "model.safetensors")
    assert {key: tuple(value.shape) for key, value in stored.items()} == {
        k: tuple(v.shape) for k, v in eagle3().items()
    }
    assert (stored["d2t"].dtype, stored["t2d"].dtype, stored["fc.weight"].dtype) == (
        torch.int64,
        torch.bool,
        torch.bfloat16,
    )
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["norm_before_residual"] is False
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["torch_dtype"] == "bfloat16"
    assert not any("layer_ids" in key for key in config)


def test_a_head_that_shares_the_targets_output_is_stored_without_it_and_gets_it_back(tmp_path: Path) -> None:
    cell = EagleCell(EagleConfig.from_dict(CONFIG), IDS)
    save_eagle(cell, tmp_path, shares_output=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_eagle(tmp_path, H, V)
    assert isinstance(loaded, EagleCell)
    output = torch.nn.Linear(H, V, bias=False)
    share_output(loaded, SimpleNamespace(get_output_embeddings=lambda: output))
    assert torch.equal(loaded.lm_head.weight, output.weight[IDS])
    assert all(
        torch.equal(value, cell.state_dict()[key])
        for key, value in loaded.state_dict().items()
        if key != "lm_head.weight"
    )
    # What is exported is whole, and is no longer replaced.
    save_eagle(loaded, tmp_path / "exported")
    whole = load_eagle(tmp_path / "exported", H, V)
    assert isinstance(whole, EagleCell)
    share_output(whole, SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(H, V)))
    assert torch.equal(whole.lm_head.weight, output.weight[IDS])


def test_a_missing_output_matrix_is_an_error_where_none_is_shared(tmp_path: Path) -> None:
    save_eagle(EagleCell(EagleConfig.from_dict(CONFIG), IDS), tmp_path, shares_output=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["specdec_shares_output"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_eagle(tmp_path, H, V)


def without(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(key)


def changed(key: str, value: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: value})


FAULTS: dict[str, tuple[Callable[[Tensors], None], dict[str, Any], str]] = {
    "missing key": (without("midlayer.mlp.up_proj.weight"), {}, "lacks midlayer.mlp.up_proj.weight"),
    "missing norm": (without("midlayer.hidden_norm.weight"), {}, "lacks midlayer.hidden_norm.weight"),
    "missing output": (without("lm_head.weight"), {}, "lacks lm_head.weight"),
    "one half of the mapping": (without("t2d"), {}, "lacks t2d"),
    "unknown key": (changed("midlayer.self_attn.q_norm.weight", torch.ones(D)), {}, "holds midlayer.self_attn.q_norm"),
    "second layer": (changed("layers.1.mlp.up_proj.weight", torch.ones(I, H)), {}, r"holds layers\.1"),
    "wrong shape": (changed("fc.weight", torch.ones(H, 2 * H)), {}, r"fc.weight .* \(8, 24\), got \(8, 16\)"),
    "heads that disagree with the keys": (lambda _: None, {"num_key_value_heads": 2}, "k_proj.weight .* must have"),
    "d2t outside": (changed("d2t", torch.full((VD,), V)), {}, r"d2t .* in \[0, 20\)"),
    "d2t twice": (changed("d2t", torch.tensor([0, -1, 0, 0, 0, 0])), {}, "names a token id twice"),
    "t2d of other ids": (changed("t2d", torch.arange(V) < VD), {}, "d2t and t2d .* disagree on 6 token ids"),
    "another target": (lambda _: None, {"vocab_size": V + 1}, "made for a target .* specdec train eagle"),
    "another architecture": (lambda _: None, {"architectures": ["DFlashDraftModel"]}, "DFlashDraftModel is not known"),
    "own layer ids": (lambda _: None, {"eagle_aux_hidden_state_layer_ids": [1, 3]}, "engines disagree by one"),
    "a narrow head without an embedding": (
        lambda _: None, {"hidden_size": H // 2, "target_hidden_size": H}, "lacks embed_tokens.weight",
    ),
    "no size": (lambda _: None, {"hidden_size": "wide"}, "no size"),
    "no heads": (lambda _: None, {"num_attention_heads": 0}, "num_attention_heads .* at least 1, got 0"),
    "a negative size": (lambda _: None, {"intermediate_size": -I}, "intermediate_size .* at least 1, got -12"),
    "heads that do not share out": (lambda _: None, {"num_attention_heads": 3, "num_key_value_heads": 2}, "a multiple"),
    "another activation": (lambda _: None, {"hidden_act": "zelu"}, "hidden_act 'zelu' .* not known"),
    "another rotation": (lambda _: None, {"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' .* not known"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, config, message = FAULTS[fault]
    tensors = eagle3()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_eagle(write(tmp_path, tensors, **config), H, V)


def test_damaged_and_hostile_files_are_refused(tmp_path: Path) -> None:
    """A pickle that would run code is not run to find out."""
    write(tmp_path, eagle3())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        load_eagle(tmp_path, H, V)
    file.unlink()
    torch.save({"fc.weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than plain tensors"):
        load_eagle(tmp_path, H, V)
    with pytest.raises(CheckpointError, match="there is no drafter checkpoint"):
        load_eagle(tmp_path / "nowhere", H, V)
    (tmp_path / "config.json").unlink()
    write(tmp_path / "other", eagle3())
    (tmp_path / "other" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        load_eagle(tmp_path / "other", H, V)
