"""No key of a published head's config, and none of its tensors, is passed over in silence."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_files import CONFIG, H, V, eagle1, eagle3, write
from published import Head, Tensors
from safetensors.torch import load_file, save_file

from specdec.drafters.heads.eagle_cell import EagleCell, FeatureCell
from specdec.drafters.heads.eagle_config import EagleConfig
from specdec.drafters.heads.eagle_format import load_eagle
from specdec.errors import CheckpointError

SPECULATORS = Head("speculators", (1, 3, 7), (1, 3, 7), first="layers.0")
HARMLESS: dict[str, Any] = {
    "dtype": "bfloat16", "pad_token_id": 3, "image_token_id": 9, "initializer_range": 0.01, "use_cache": True,
    "attention_dropout": 0.1, "transformers_version": "4.51.0", "pretraining_tp": 2, "_name_or_path": "org/head",
    "max_window_layers": 36, "sliding_window": 4096, "use_sliding_window": False, "target_model_type": "qwen3_vl",
    "auto_map": {"": "x.y"}, "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "hidden_act": "silu",
    "parallel_drafting": False, "logit_scale": 1.0, "layer_types": ["full_attention"], "partial_rotary_factor": 1.0,
    "a_new_flag": False, "another": None, "a_number": 0, "a_list": [],
}  # fmt: skip


def loaded(path: Path, **changes: Any) -> EagleCell:
    cell = load_eagle(write(path, eagle3(), **changes), H, V)
    assert isinstance(cell, EagleCell)
    return cell


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_without_influence_and_neutral_values_load_without_a_word(tmp_path: Path, key: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(tmp_path, **{key: HARMLESS[key]})


@pytest.mark.parametrize("value", [True, 2, "gelu", [1], {"a": 1}], ids=str)
def test_an_unknown_key_that_may_matter_is_named_in_a_warning(tmp_path: Path, value: Any) -> None:
    """Refusing all of them would refuse heads whose configs hold what their targets' hold."""
    with pytest.warns(UserWarning, match=r"says post_fc_norm = .* not known here"):
        loaded(tmp_path, post_fc_norm=value)
    with pytest.warns(UserWarning, match=r"says post_fc_norm = .* not known here"):
        loaded(tmp_path, eagle_config={"post_fc_norm": value})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "parallel drafting": ({"parallel_drafting": True}, "parallel_drafting = True .* mask token"),
    "ModelOpt's parallel steps": ({"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step = 4"),
    "a mask token": ({"mask_token_id": 7}, "mask_token_id = 7"),
    "P-EAGLE": ({"speculators_model_type": "peagle"}, "speculators_model_type 'peagle' .* eagle3 and eagle"),
    "a window": ({"use_sliding_window": True}, "use_sliding_window = True .* must be False"),
    "a window's layer": ({"layer_types": ["sliding_attention"]}, r"layer_types = \['sliding_attention'\]"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    "scaled logits": ({"logit_scale": 0.5}, "logit_scale = 0.5 .* must be 1"),
    "a quarter turned": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 .* must be 1"),
    "no last norm": ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm = False"),
    "bare embeddings": (
        {"eagle_config": {"use_input_layernorm_in_first_layer": False}}, "use_input_layernorm_in_first_layer = False",
    ),
    "norms of MTP": ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm = True"),
    "fc_norm without its norms": ({"fc_norm": True}, r"lacks fc_norm\.0\.weight"),
    "SGLang's former fc_norm": ({"use_aux_norm": True}, r"lacks fc_norm\.0\.weight"),
    "norm_before_fc without its norm": ({"norm_before_fc": True}, r"lacks input_norm\.weight"),
    "norm_before_fc in eagle_config": ({"eagle_config": {"norm_before_fc": True}}, r"lacks input_norm\.weight"),
    "attention_bias without biases": ({"attention_bias": True}, r"lacks midlayer\.self_attn\.q_proj\.bias"),
    "mlp_bias without biases": ({"mlp_bias": True}, r"lacks midlayer\.mlp\.gate_proj\.bias"),
    "bias without one": ({"bias": True}, r"lacks fc\.bias"),
    "qk_norm without norms": ({"qk_norm": True}, r"lacks midlayer\.self_attn\.q_norm"),
    "use_qk_norm without norms": ({"use_qk_norm": True}, r"lacks midlayer\.self_attn\.q_norm"),
    "another first layer of a second": ({"num_hidden_layers": 2}, r"lacks layers\.1\."),
    "another size of features": ({"target_hidden_size": 2 * H}, "made for a target of hidden size 16"),
    "features of no layer": ({"eagle_config": {"use_aux_hidden_state": False}}, r"holds fc\.weight"),
    "a text for a flag": ({"norm_before_residual": "false"}, "norm_before_residual .* true or false, got 'false'"),
    "a text for a number": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps .* must be a number, got '1e-6'"),
    "half a head": ({"num_attention_heads": 2.5}, "no size: num_attention_heads = 2.5"),
    "four features without ids": ({"num_aux_hidden_states": 4}, r"fc.weight .* must have shape \(8, 32\)"),
    "another number of features": (
        {"num_aux_hidden_states": 4, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, "num_aux_hidden_states 4, but names 3",
    ),
    "ids twice": ({"eagle_aux_hidden_state_layer_ids": [1, 1, 3]}, r"different layer numbers, got \[1, 1, 3\]"),
    "ids from the end": ({"eagle_aux_hidden_state_layer_ids": [-1, 2, 3]}, "different layer numbers"),
    "ids of no kind": ({"eagle_aux_hidden_state_layer_ids": "2,5,9"}, "different layer numbers, got '2,5,9'"),
    "ids that contradict each other": (
        {"eagle_aux_hidden_state_layer_ids": [1, 3, 7], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}},
        r"twice.* hidden_states\[1, 3, 7\] and hidden_states\[2, 4, 8\]; .* option layers",
    ),
    "flags that contradict each other": (
        {"norm_before_fc": False, "eagle_config": {"norm_before_fc": True}}, "norm_before_fc .* is False, but True in its",
    ),
    "positions that contradict each other": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta .* is 5000.0, but 7.0",
    ),
    "two ways to scale positions": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "disagree on factor: 2.0 and 4.0",
    ),
    "scaled positions without a factor": ({"rope_scaling": {"rope_type": "linear"}}, "positions cannot be made .*factor"),
    "positions scaled by nothing": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "finite frequencies"),
    "positions of another kind": ({"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 9}}, "rope_scaling.alpha = 9"),
    "positions by kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5000.0}}}, "rope_parameters.full_attention = ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_the_network_here_is_not_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    changes, message = REFUSED[fault]
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path, **changes)


def test_what_a_config_leaves_out_is_what_transformers_takes_for_it() -> None:
    """Guards the epsilon of norms: 1e-6 in Llama's and Qwen's configs."""
    config = {key: value for key, value in CONFIG.items() if key not in ("rms_norm_eps", "rope_theta", "head_dim")}
    found = EagleConfig.from_dict(config)
    assert (found.rms_norm_eps, found.rope_parameters["rope_theta"], found.head_dim) == (1e-6, 10000.0, 4)
    assert EagleConfig.from_dict(config | {"model_type": "qwen3"}).head_dim == 128


def test_ids_in_both_counts_may_stand_side_by_side(tmp_path: Path) -> None:
    """As the export writes them."""
    ids = {
        "eagle_aux_hidden_state_layer_ids": [2, 4, 8],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [7, 3, 1]},
    }
    assert loaded(tmp_path, **ids).config.feature_layers == (2, 4, 8)


SPECULATORS_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no residual": ({"norm_before_residual": None}, "lacks norm_before_residual, .* write true or false"),
    "another layer": (
        {"transformer_layer_config": {"model_type": "qwen3_next"}},
        "'llama' or 'qwen3'.* got 'qwen3_next'",
    ),
    "no layer": ({"transformer_layer_config": None}, "'llama' or 'qwen3'.* got None"),
    "a mask token": ({"mask_token_id": 5}, "mask_token_id = 5"),
    "two ids": ({"eagle_aux_hidden_state_layer_ids": [1, 3]}, "reads 3 layers .* engines disagree by one"),
}


@pytest.mark.parametrize("fault", SPECULATORS_FAULTS)
def test_what_does_not_fit_in_the_layout_of_speculators_is_refused(tmp_path: Path, fault: str) -> None:
    changes, message = SPECULATORS_FAULTS[fault]
    folder = SPECULATORS.write(tmp_path, V)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_eagle(folder, 32, V)


TENSORS: dict[str, tuple[str, str]] = {
    "another spelling beside the first": ("midlayer.hidden_norm.weight", "hidden_norm.weight under two names"),
    "P-EAGLE's mask": ("mask_hidden", "holds mask_hidden"),
    "a norm that no flag names": ("input_norm.weight", "holds input_norm.weight"),
    "a scale of weights": ("layers.0.mlp.up_proj.weight_scale", "holds midlayer.mlp.up_proj.weight_scale"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_a_tensor_too_many_is_refused(tmp_path: Path, fault: str) -> None:
    key, message = TENSORS[fault]
    folder = SPECULATORS.write(tmp_path, V)
    save_file(load_file(folder / "model.safetensors") | {key: torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_eagle(folder, 32, V)


def test_copies_of_the_targets_weights_for_training_are_left_out(tmp_path: Path) -> None:
    folder = SPECULATORS.write(tmp_path, V)
    copies = {"verifier_lm_head.weight": torch.ones(7, 32), "verifier_norm.weight": torch.ones(32)}
    save_file(load_file(folder / "model.safetensors") | copies, folder / "model.safetensors")
    assert "verifier_norm.weight" not in load_eagle(folder, 32, V).state_dict()


def test_norms_by_sglangs_former_names_are_those_of_each_feature(tmp_path: Path) -> None:
    head = Head(fc_norm=True)
    folder = head.write(tmp_path, V)
    tensors = head.tensors(V)
    for i, part in enumerate(("low", "mid", "high")):
        tensors[f"aux_norm_{part}.weight"] = tensors.pop(f"fc_norm.{i}.weight")
    save_file(tensors, folder / "model.safetensors")
    found = load_eagle(folder, 32, V).state_dict()["fc_norm.1.weight"]
    assert torch.equal(found, tensors["aux_norm_mid.weight"])


def eagle1_of_speculators(tensors: Tensors) -> Tensors:
    return {
        key.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer."): value for key, value in tensors.items()
    }


@pytest.mark.parametrize("layernorms", [False, True])
def test_eagle1_in_the_layout_of_speculators(tmp_path: Path, layernorms: bool) -> None:
    tensors = eagle1(bias=True)
    write(tmp_path, eagle1_of_speculators(tensors))
    layer = {key: value for key, value in CONFIG.items() if key not in ("architectures", "draft_vocab_size")}
    config = {
        "speculators_model_type": "eagle", "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "transformer_layer_architecture": "LlamaDecoderLayer", "transformer_layer_config": layer, "fusion_bias": True,
        "layernorms": layernorms, "speculators_config": {"algorithm": "eagle"}, "speculators_version": "0.1.0",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    if layernorms:
        with pytest.raises(CheckpointError, match="layernorms = True"):
            load_eagle(tmp_path, H, V)
        return
    cell = load_eagle(tmp_path, H, V)
    assert isinstance(cell, FeatureCell)
    assert cell.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in cell.state_dict().items())


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_output", "fc_norm", "norm_before_fc"])
def test_flags_of_eagle3_are_refused_for_a_head_of_eagle1(tmp_path: Path, flag: str) -> None:
    write(tmp_path, eagle1(), architectures=["LlamaForCausalLM"], **{flag: True})
    with pytest.raises(CheckpointError, match=rf"has {flag}, but its tensors are an EAGLE-1 or 2 head's"):
        load_eagle(tmp_path, H, V)


IDS = torch.tensor([1, 2, 5, 9, 10, 19])
MAPPINGS: dict[str, tuple[dict[str, Any], str]] = {
    "ids for offsets": ({"d2t": IDS}, "must be offsets, got what looks like the target ids"),
    "fractions": ({"d2t": (IDS - torch.arange(6)).float()}, "d2t .* whole numbers, got torch.float32"),
    "truths": ({"d2t": torch.ones(6, dtype=torch.bool)}, "d2t .* whole numbers, got torch.bool"),
    "places for truths": ({"t2d": torch.arange(V) - 1}, "t2d .* 0 or 1, got -1 to 18"),
    "too few": ({"d2t": torch.zeros(5, dtype=torch.long)}, r"d2t .* must have shape \(6,\)"),
    "a table": ({"t2d": torch.ones(V, 1, dtype=torch.bool)}, r"t2d .* must have shape \(20,\)"),
    "another vocabulary": ({"t2d": torch.ones(V, dtype=torch.bool)}, "disagree on 14 token ids"),
}


@pytest.mark.parametrize("fault", MAPPINGS)
def test_a_mapping_of_another_kind_is_refused(tmp_path: Path, fault: str) -> None:
    changes, message = MAPPINGS[fault]
    with pytest.raises(CheckpointError, match=message):
        load_eagle(write(tmp_path, eagle3() | changes), H, V)


def test_truths_may_be_stored_as_numbers(tmp_path: Path) -> None:
    tensors = eagle3()
    tensors["t2d"] = tensors["t2d"].to(torch.int8)
    tensors["d2t"] = tensors["d2t"].to(torch.int32)
    cell = load_eagle(write(tmp_path, tensors), H, V)
    assert cell.target_ids().tolist() == IDS.tolist()


def test_where_d2t_stands_alone_its_values_must_be_offsets(tmp_path: Path) -> None:
    """Ids read as offsets would lead to other tokens, without an error."""
    head = replace(Head("nested", (1, 3, 5), (2, 4, 6)), has_t2d=False)
    folder = head.write(tmp_path, V)
    cell = load_eagle(folder, 32, V)
    assert cell.target_ids().tolist() == list(head.draft_vocab or ())
    assert isinstance(cell, EagleCell)
    assert cell.t2d.nonzero().flatten().tolist() == list(head.draft_vocab or ())
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"d2t": torch.tensor(head.draft_vocab)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="must be offsets"):
        load_eagle(folder, 32, V)
    save_file(tensors | {"d2t": torch.full((7,), V)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"d2t .* in \[0, 20\)"):
        load_eagle(folder, 32, V)
