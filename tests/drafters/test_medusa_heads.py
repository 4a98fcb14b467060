"""Medusa heads: published layouts load, what does not fit is refused by name, and a fresh head is the target's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.heads.medusa_heads import MedusaHeads, load_medusa, save_medusa
from specdec.errors import CheckpointError

H, V = 8, 20
Tensors = dict[str, Tensor]


def layout(heads: int = 3, layers: int = 2, owns: bool = True, prefix: str = "") -> Tensors:
    """FasterDecoding's keys, written by hand."""
    tensors = {}
    for i in range(heads):
        for j in range(layers):
            tensors[f"{prefix}{i}.{j}.linear.weight"] = torch.randn(H, H)
            tensors[f"{prefix}{i}.{j}.linear.bias"] = torch.randn(H)
        if owns:
            tensors[f"{prefix}{i}.{layers}.weight"] = torch.randn(V, H)
    return tensors


def expected(
    tensors: Tensors, head: int, layers: int, hidden: Tensor, output: Tensor | None, prefix: str = ""
) -> Tensor:
    x = hidden
    for j in range(layers):
        key = f"{prefix}{head}.{j}.linear"
        x = x + torch.nn.functional.silu(x @ tensors[f"{key}.weight"].T + tensors[f"{key}.bias"])
    return x @ (tensors[f"{prefix}{head}.{layers}.weight"] if output is None else output).T


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt", "heads.pt"])
@pytest.mark.parametrize("owns", [True, False], ids=["v0.1", "legacy"])
@pytest.mark.parametrize(("heads", "layers"), [(3, 2), (5, 1)])
def test_counts_come_from_the_keys(tmp_path: Path, name: str, owns: bool, heads: int, layers: int) -> None:
    """Published configs are wrong: this one says 2 heads of 9 layers."""
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 9}))
    tensors, file = layout(heads, layers, owns), tmp_path / name
    (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)  # type: ignore[operator]
    loaded = load_medusa(file if name == "heads.pt" else tmp_path, H, V)
    assert (loaded.num_heads, loaded.num_layers, loaded.shares_output) == (heads, layers, not owns)
    hidden, output = torch.randn(4, H), None if owns else torch.randn(V, H)
    logits = loaded(hidden, output)
    for i in range(heads):
        torch.testing.assert_close(logits[i], expected(tensors, i, layers, hidden, output))


def test_medusa_2_heads_are_read_out_of_a_full_checkpoint_in_parts(tmp_path: Path) -> None:
    """The base model's file does not even exist here: it must not be read."""
    heads = layout(prefix="medusa_head.")
    save_file(heads, tmp_path / "model-00002-of-00002.safetensors")
    index = dict.fromkeys(heads, "model-00002-of-00002.safetensors")
    index["model.embed_tokens.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = load_medusa(tmp_path, H, V)
    hidden = torch.randn(4, H)
    torch.testing.assert_close(loaded(hidden)[2], expected(heads, 2, 2, hidden, None, "medusa_head."))


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("vocab", [None, torch.tensor([3, 4, 11])], ids=["full", "reduced"])
def test_what_was_saved_loads_equal(tmp_path: Path, shares: bool, vocab: Tensor | None) -> None:
    heads = MedusaHeads(2, 1, H, V, vocab, shares)
    torch.nn.init.normal_(heads.heads[1][0].linear.weight)  # type: ignore[index, union-attr, arg-type]
    heads.choices, heads.accuracies = ((0,), (1,), (0, 0)), ((0.5, 0.25), (0.3, 0.2))
    save_medusa(heads, tmp_path / "heads", {"hidden_size": H})
    loaded = load_medusa(tmp_path / "heads", H, V)
    hidden, output = torch.randn(2, 3, H), torch.randn(V, H)
    assert torch.equal(loaded(hidden, output), heads(hidden, output))
    assert loaded.target_ids().tolist() == (list(range(V)) if vocab is None else vocab.tolist())
    assert (loaded.choices, loaded.accuracies) == (heads.choices, heads.accuracies)


def test_a_fresh_head_says_what_the_targets_own_matrix_says() -> None:
    heads, hidden, output = MedusaHeads(2, 3, H, V), torch.randn(5, H), torch.randn(V, H)
    torch.testing.assert_close(heads(hidden, output), torch.stack([hidden @ output.T] * 2))
    with pytest.raises(ValueError, match="pass output_weight"):
        heads(hidden)


FAULTS = {
    "missing bias": ({"1.0.linear.bias": None}, r"lacks 1\.0\.linear\.bias"),
    "missing output": ({"2.2.weight": None}, r"lacks 2\.2\.weight"),
    "missing head": ({key: None for key in layout() if key.startswith("1.")}, r"lacks 1\.0\.linear"),
    "unknown key": ({"0.0.linear.scale": torch.ones(1)}, r"holds 0\.0\.linear\.scale"),
    "base model's key": ({"lm_head.weight": torch.ones(V, H)}, "holds lm_head.weight"),
    "another hidden size": (
        {"0.0.linear.weight": torch.ones(H, H + 1)},
        r"0\.0\.linear\.weight .* \(8, 8\), got \(8, 9\)",
    ),
    "another vocabulary": ({"0.2.weight": torch.ones(V + 1, H)}, r"0\.2\.weight .* \(20, 8\), got \(21, 8\)"),
    "draft ids outside": ({"draft_vocab": torch.tensor([1, V])}, r"draft_vocab .* \[0, 20\)"),
    "draft ids twice": ({"draft_vocab": torch.tensor([1, 1])}, "twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    changes, message = FAULTS[fault]
    tensors = {key: value for key, value in (layout() | changes).items() if value is not None}
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_medusa(tmp_path, H, V)


def test_a_folder_without_heads_and_choices_that_are_no_tree_are_refused(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(H)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no Medusa heads"):
        load_medusa(tmp_path, H, V)
    save_file(layout(), tmp_path / "medusa_lm_head.safetensors")
    for config, message in (
        ({"choices": [[0, 0]]}, r"choices .* are no tree"),
        ({"choices": 3}, r"choices .* are no tree"),
        ({"accuracies": "high"}, r"accuracies .* are no table"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            load_medusa(tmp_path, H, V)
