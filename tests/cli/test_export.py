"""The exported EAGLE-3 folder: the documented layout key for key, the same drafts, and commands that fit it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tinychat import VOCAB, Command, make_tokenizer, save
from trained import random_eagle, tiny_target
from transformers import LlamaForCausalLM

from specdec.cli.export import Engine, Layout, export, serve_commands, unread_keys
from specdec.drafters.heads.eagle_cell import EagleCell
from specdec.drafters.heads.eagle_engine import feature_layers
from specdec.drafters.heads.eagle_format import load_eagle, save_eagle
from specdec.drafters.heads.shipped import target_facts
from specdec.drafters.training.eagle import unrolled

IDS = sorted({*range(0, VOCAB, 3), 258})
ROPE = {
    "rope_type": "llama3", "rope_theta": 20000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def make_target() -> LlamaForCausalLM:
    """With scaled positions, and deep enough that the layers a head reads are three different ones."""
    model = tiny_target(VOCAB, layers=8)
    model.config.rope_parameters = ROPE
    scaled = LlamaForCausalLM(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A target, and a head for it that has no output matrix of its own."""
    model = make_target()
    target = save(tmp_path_factory.mktemp("target"), model, make_tokenizer())
    head = tmp_path_factory.mktemp("head")
    save_eagle(random_eagle(model, IDS).bfloat16(), head, target_facts(model), shares_output=True)
    return target, head


@pytest.fixture(scope="module")
def exported(folders: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The exported folder and what the command printed."""
    target, head = folders
    output = tmp_path_factory.mktemp("out") / 'an, "export"'
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        export(Layout.EAGLE3, head, output, target, Engine.VLLM, measure=2, dtype="auto", device="cpu", threads=None)
    return output, printed.getvalue()


def test_every_key_shape_and_type_is_the_documented_one(exported: tuple[Path, str]) -> None:
    folder, _ = exported
    h, inner, heads, groups, size, v, vd = 32, 64, 4, 2, 8, VOCAB, len(IDS)
    expected = {
        "fc.weight": (h, 3 * h),
        "midlayer.hidden_norm.weight": (h,),
        "midlayer.input_layernorm.weight": (h,),
        "midlayer.post_attention_layernorm.weight": (h,),
        "midlayer.self_attn.q_proj.weight": (heads * size, 2 * h),
        "midlayer.self_attn.k_proj.weight": (groups * size, 2 * h),
        "midlayer.self_attn.v_proj.weight": (groups * size, 2 * h),
        "midlayer.self_attn.o_proj.weight": (h, heads * size),
        "midlayer.mlp.gate_proj.weight": (inner, h),
        "midlayer.mlp.up_proj.weight": (inner, h),
        "midlayer.mlp.down_proj.weight": (h, inner),
        "norm.weight": (h,),
        "lm_head.weight": (vd, h),
        "d2t": (vd,),
        "t2d": (v,),
    }
    tensors = load_file(folder / "model.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == expected
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert (tensors["d2t"] + torch.arange(vd)).tolist() == IDS == tensors["t2d"].nonzero().flatten().tolist()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["model_type"], config["num_hidden_layers"], config["norm_before_residual"]) == ("llama", 1, False)
    assert (config["vocab_size"], config["draft_vocab_size"], config["tie_word_embeddings"]) == (v, vd, False)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    older = {key: value for key, value in ROPE.items() if key != "rope_theta"}
    assert config["rope_parameters"] == ROPE
    assert config["rope_scaling"] == older  # where only this is read, positions would else not be scaled
    assert {"hidden_size", "intermediate_size", "head_dim", "rms_norm_eps", "bos_token_id", "eos_token_id"} <= set(
        config
    )
    assert not any("specdec" in key or "layer_ids" in key for key in config)


def test_the_export_drafts_bit_for_bit_as_the_head(folders: tuple[str, Path], exported: tuple[Path, str]) -> None:
    target, head = folders
    ours, theirs = load_eagle(head, 32, VOCAB), load_eagle(exported[0], 32, VOCAB)
    assert isinstance(ours, EagleCell)
    assert isinstance(theirs, EagleCell)
    matrix = make_target().get_output_embeddings().weight.detach()
    assert torch.equal(theirs.lm_head.weight, matrix[IDS].bfloat16().float())
    same = [
        torch.equal(theirs.state_dict()[key], value)
        for key, value in ours.state_dict().items()
        if key != "lm_head.weight"
    ]
    assert all(same)
    assert target


def test_what_the_chain_accepts_is_written_in_the_engines_field_names(exported: tuple[Path, str]) -> None:
    facts = json.loads((exported[0] / "acceptance.json").read_text())
    assert set(facts) == {
        "num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos", "mean_acceptance_length",
    }  # fmt: skip
    assert sum(facts["num_accepted_tokens_per_pos"]) == facts["num_accepted_tokens"]
    assert facts["num_drafts"] > 0


def test_the_printed_command_names_target_and_folder(exported: tuple[Path, str], folders: tuple[str, Path]) -> None:
    words = shlex.split(exported[1])
    assert words[:2] == ["vllm", "serve"]
    assert folders[0] in words
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert config == {"method": "eagle3", "model": str(exported[0]), "num_speculative_tokens": 3}
    commands = serve_commands("org/model", Path("a folder"))
    assert "--speculative-algorithm EAGLE3" in commands[Engine.SGLANG]
    assert shlex.split(commands[Engine.LLAMA_CPP])[2:] == ["a folder", "--target-model-dir", "org/model"]
    assert all(command in (exported[0] / "README.md").read_text() for command in (exported[1].strip(),))


LAYERS = "eagle_aux_hidden_state_layer_ids"
UNUSUAL: dict[str, tuple[dict[str, Any], set[Engine]]] = {
    "plain": ({}, set(Engine)),
    "norm_before_residual": ({"norm_before_residual": True}, {Engine.VLLM, Engine.LLAMA_CPP}),
    "norm_before_fc": ({"norm_before_fc": True}, set(Engine)),
    "fc_norm and norm_output": ({"fc_norm": True, "norm_output": True}, {Engine.VLLM, Engine.SGLANG}),
    "its own layers": ({"feature_layers": (1, 4, 7)}, {Engine.VLLM, Engine.SGLANG}),
    "two layers": ({"num_hidden_layers": 2}, {Engine.VLLM}),
    "qk_norm": ({"qk_norm": True}, {Engine.VLLM}),
    "biases": ({"attention_bias": True, "output_bias": True, "mlp_bias": True}, {Engine.VLLM}),
    "half of the biases": ({"attention_bias": True}, set()),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_head_is_served_only_by_engines_that_read_its_config(kind: str) -> None:
    """Guards flags that an engine passes over in silence: SGLang knows no norm_before_residual."""
    changes, readers = UNUSUAL[kind]
    unusual = random_eagle(make_target(), IDS, **changes).config.unusual()
    assert {engine for engine in Engine if not unread_keys(unusual, engine)} == readers


def test_an_engine_that_would_draft_badly_is_refused_and_left_out(
    folders: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, model = folders[0], make_target()
    save_eagle(random_eagle(model, IDS, norm_before_residual=True), tmp_path / "head", target_facts(model))
    output = tmp_path / "out"
    words = ["export", "eagle3", str(tmp_path / "head"), "--target", target, "--output", str(output), "--measure", "0"]
    refused = Command(monkeypatch, capsys)(*words, "--for", "sglang")
    assert refused.status == 2
    assert "sglang is not known to read norm_before_residual" in refused.error
    assert not output.exists()
    assert Command(monkeypatch, capsys)(*words, "--for", "vllm").status == 0
    readme = (output / "README.md").read_text()
    assert "vllm serve" in readme
    assert "sglang" not in readme
    assert json.loads((output / "config.json").read_text())["norm_before_residual"] is True


def test_layers_of_its_own_are_written_as_each_engine_counts_them(tmp_path: Path) -> None:
    """vLLM reads hidden_states[id]; SGLang what layer id puts out, hidden_states[id + 1]."""
    save_eagle(random_eagle(make_target(), IDS, feature_layers=(0, 4, 7)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[LAYERS] == [0, 4, 7]
    assert config["eagle_config"][LAYERS] == [-1, 3, 6]
    cell = load_eagle(tmp_path, 32, VOCAB)
    assert cell.config.feature_layers == (0, 4, 7)


@pytest.mark.parametrize("fault", ["not empty", "another target", "no head"])
def test_what_cannot_be_exported_is_refused(
    folders: tuple[str, Path],
    tmp_path: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, head = folders
    output = tmp_path / "out"
    if fault == "not empty":
        output.mkdir()
        (output / "precious").write_text("x")
    elif fault == "another target":
        config: dict[str, Any] = json.loads((head / "config.json").read_text())
        config["specdec_target"]["fingerprint"][1] *= 2
        head = Path(shutil.copytree(head, tmp_path / "head"))
        (head / "config.json").write_text(json.dumps(config))
    else:
        head = tmp_path
    ran = Command(monkeypatch, capsys)("export", "eagle3", str(head), "--target", target, "--output", str(output))
    assert ran.status == 2
    assert {"not empty": "new folder", "another target": "--target", "no head": "config.json"}[fault] in ran.error


@pytest.mark.skipif(importlib.util.find_spec("speculators") is None, reason="the library speculators is not installed")
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_speculators_reads_the_folder_and_drafts_the_same_tokens(
    exported: tuple[Path, str], folders: tuple[str, Path], tmp_path: Path
) -> None:
    """Its own network, unrolled for three steps, against ours: keys, positions, features and residuals all have to agree."""
    converted, target = str(tmp_path / "converted"), folders[0]
    command = ["speculators", "convert", str(exported[0]), "--verifier", target, "--algorithm", "eagle3"]
    ran = subprocess.run(
        [*command, "--output-path", converted], check=True, timeout=300, capture_output=True, text=True
    )
    assert "keys in checkpoint" not in ran.stderr  # it warns of missing and unexpected ones

    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    config = Eagle3SpeculatorConfig.from_pretrained(converted)
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = Eagle3DraftModel.from_pretrained(converted, config=config).eval()
    # It takes the target's embedding where it finds NaN, but what it finds there is whatever the memory held.
    torch.nn.init.constant_(theirs.embed_tokens.weight, torch.nan)
    theirs.load_verifier_weights()
    theirs.float()
    model, cell = make_target(), load_eagle(exported[0], 32, VOCAB)
    assert isinstance(cell, EagleCell)
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    features = torch.cat([states[i] for i in feature_layers(8)], -1)[:, :-1]
    drafted = theirs(features, tokens[:, 1:], torch.zeros(1, 39, dtype=torch.long), ttt_steps=3)
    embeds, positions = model.get_input_embeddings()(tokens[:, 1:]), torch.arange(39)[None]
    steps = unrolled(cell, embeds, features, positions, 3)
    for step, (states, others) in enumerate(zip(steps, drafted, strict=True)):
        ours = cell.logits(states).argmax(-1)
        assert torch.equal(ours[:, step:], others[:, : 39 - step])  # it moves the tokens, not the states
