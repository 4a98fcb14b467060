"""EAGLE checkpoints: reading the published layouts into their networks, and writing EAGLE-3's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.checkpoint_io import CONFIG, TensorFiles, check_tensors, check_vocab, read_json, save_tensors
from specdec.drafters.eagle_cell import EagleCell, FeatureCell
from specdec.drafters.eagle_config import EagleConfig
from specdec.errors import CheckpointError

_OUTPUT = "lm_head.weight"
_DERIVED = "rotary_emb.inv_freq"  # older checkpoints hold what the config says already


def load_eagle(path: str | Path, hidden_size: int, vocab_size: int) -> EagleCell | FeatureCell:
    """The head in a folder (or a file beside its config.json), for a target of these sizes.

    Raises:
        CheckpointError: a key is missing or unknown, a shape does not fit, or the draft vocabulary contradicts itself.
    """
    path = Path(path)
    files = TensorFiles(path)
    tensors = {key: value for key, value in files.read(files.keys).items() if not key.endswith(_DERIVED)}
    config = EagleConfig.from_dict(read_json((path if path.is_dir() else path.parent) / CONFIG))
    config = replace(config, has_embedding="embed_tokens.weight" in tensors)
    if (config.target_hidden_size, config.vocab_size) != (hidden_size, vocab_size):
        raise CheckpointError(
            f"{path} was made for a target of hidden size {config.target_hidden_size} and {config.vocab_size} token ids, "
            f"but this one has {hidden_size} and {vocab_size}; train one for it with specdec train eagle"
        )
    if any(key.endswith("hidden_norm.weight") for key in tensors) or "lm_head.weight" in tensors:
        return _eagle3(tensors, config, path)
    return _eagle1(tensors, config, path)


def _eagle3(tensors: dict[str, Tensor], config: EagleConfig, path: Path) -> EagleCell:
    if config.hidden_size != config.target_hidden_size and not config.has_embedding:
        raise CheckpointError(
            f"{path} lacks embed_tokens.weight: a head of hidden size {config.hidden_size} cannot read its target's "
            f"embeddings of size {config.target_hidden_size}"
        )
    tensors = {_midlayer(key): value for key, value in tensors.items()}
    config = replace(config, attention_bias="midlayer.self_attn.q_proj.bias" in tensors)
    shares_output = config.shares_output and _OUTPUT not in tensors
    if config.draft_vocab_size == config.vocab_size and not {"d2t", "t2d"} & set(tensors):
        tensors["d2t"] = torch.zeros(config.vocab_size, dtype=torch.long)
        tensors["t2d"] = torch.ones(config.vocab_size, dtype=torch.bool)
    with torch.device("meta"):
        expected = EagleCell(config).state_dict()
    if shares_output:
        expected.pop(_OUTPUT)
    check_tensors(tensors, {key: tuple(value.shape) for key, value in expected.items()}, path)
    _check_mapping(tensors["d2t"], tensors["t2d"], config, path)
    cell = EagleCell(replace(config, shares_output=shares_output))
    cell.load_state_dict(tensors, strict=not shares_output)  # the keys are checked
    return cell


def _midlayer(key: str) -> str:
    return "midlayer." + key.removeprefix("layers.0.") if key.startswith("layers.0.") else key


def _check_mapping(d2t: Tensor, t2d: Tensor, config: EagleConfig, path: Path) -> None:
    ids = d2t.long() + torch.arange(len(d2t))
    check_vocab(ids, config.vocab_size, f"d2t (target id - draft id) in {path}")
    held = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    wrong = (held != t2d.bool()).nonzero().flatten()
    if len(wrong):
        raise CheckpointError(
            f"d2t and t2d in {path} disagree on {len(wrong)} token ids, such as {int(wrong[0])}: the draft's tokens are unknown"
        )


def _eagle1(tensors: dict[str, Tensor], config: EagleConfig, path: Path) -> FeatureCell:
    config = replace(
        config,
        draft_vocab_size=config.vocab_size,
        attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        fc_bias="fc.bias" in tensors,
    )
    if config.hidden_size != config.target_hidden_size:
        raise CheckpointError(f"an EAGLE-1 or 2 head has its target's hidden size, got {config.hidden_size} in {path}")
    cell = FeatureCell(config)
    check_tensors(tensors, {key: tuple(value.shape) for key, value in cell.state_dict().items()}, path)
    cell.load_state_dict(tensors)
    return cell


def save_eagle(
    cell: EagleCell, path: str | Path, base: Mapping[str, Any] | None = None, shares_output: bool = False
) -> None:
    """Write a folder in the EAGLE-3 layout, each file whole or not at all; ``base`` are facts about the target.

    With ``shares_output`` the output matrix, then the target's own, is left out: two thirds of a small head. Other
    engines need it, so this is for heads that stay with specdec.
    """
    dtype = str(cell.fc.weight.dtype).removeprefix("torch.")
    config = replace(cell.config, torch_dtype=dtype, shares_output=shares_output).to_dict()
    if base:
        config["specdec_target"] = dict(base)
    tensors = {key: value for key, value in cell.state_dict().items() if not (shares_output and key == _OUTPUT)}
    save_tensors(tensors, config, Path(path))
