"""EAGLE checkpoints: reading the published layouts into their networks, and writing EAGLE-3's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.heads.checkpoint_io import CONFIG, TensorFiles, check_tensors, read_json, save_tensors
from specdec.drafters.heads.eagle_cell import EagleCell, FeatureCell
from specdec.drafters.heads.eagle_config import EagleConfig
from specdec.drafters.heads.eagle_layouts import Layout, flattened
from specdec.drafters.heads.eagle_vocab import check_mapping, complete_mapping
from specdec.errors import CheckpointError

_OUTPUT, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
# Copies of what the config or the target says already.
_DERIVED = ("rotary_emb.inv_freq", "verifier_lm_head.weight", "verifier_norm.weight")
_SHARED_NORM = ("hidden_norm.weight", "input_layernorm.weight")  # one thing, named by SGLang and by others


def load_eagle(
    path: str | Path, hidden_size: int, vocab_size: int, layers: Sequence[int] | None = None
) -> EagleCell | FeatureCell:
    """The head in a folder (or a file beside its config.json), for a target of these sizes.

    ``layers`` are the entries of the target's ``hidden_states`` that an EAGLE-3 head reads, whatever its config says.

    Raises:
        CheckpointError: a key is missing or unknown, a shape does not fit, the config asks for a network that is not
            known here, or the draft vocabulary contradicts itself.
    """
    path = Path(path)
    files = TensorFiles(path)
    tensors = {key: value for key, value in files.read(files.keys).items() if not key.endswith(_DERIVED)}
    layout = flattened(read_json((path if path.is_dir() else path.parent) / CONFIG), layers)
    config = EagleConfig.from_layout(layout)
    if (config.target_hidden_size, config.vocab_size) != (hidden_size, vocab_size):
        raise CheckpointError(
            f"{path} was made for a target of hidden size {config.target_hidden_size} and {config.vocab_size} token ids, "
            f"but this one has {hidden_size} and {vocab_size}; train one for it with specdec train eagle"
        )
    tensors = renamed(tensors, path)
    config = _as_stored(config, tensors, layout)
    has_parts = any(key.endswith("hidden_norm.weight") for key in tensors) or _OUTPUT in tensors
    is_eagle1 = layout.is_eagle1 if layout.is_eagle1 is not None else not has_parts
    return _eagle1(tensors, config, path) if is_eagle1 else _eagle3(tensors, config, path, layout.needs_t2d)


def renamed(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``tensors`` by the names that they have here, whatever library wrote them.

    Raises:
        CheckpointError: two of them get the same name.
    """
    tensors_by_name: dict[str, Tensor] = {}
    is_eagle3 = any(key.endswith("hidden_norm.weight") for key in tensors)
    for key, value in tensors.items():
        name = key.replace("fusion_fc.", "fc.", 1) if key.startswith("fusion_fc.") else key
        for i, norm in enumerate(("aux_norm_low", "aux_norm_mid", "aux_norm_high")):
            name = name.replace(norm, f"fc_norm.{i}")
        name = "layers.0." + name.removeprefix("transformer.") if name.startswith("transformer.") else name
        if is_eagle3 and name.startswith("layers.0."):
            name = "midlayer." + name.removeprefix("layers.0.")
        elif name.startswith("layers.") and name.endswith(_SHARED_NORM[0]):
            name = name.removesuffix(_SHARED_NORM[0]) + _SHARED_NORM[1]
        if name in tensors_by_name:
            raise CheckpointError(f"{path} holds {name} under two names, {key} being one: it cannot be used")
        tensors_by_name[name] = value
    return tensors_by_name


def _as_stored(config: EagleConfig, tensors: Mapping[str, Tensor], layout: Layout) -> EagleConfig:
    """``config`` with what published configs leave to the tensors; what it asks for beyond them will be missed there."""
    first = "midlayer" if "midlayer.self_attn.q_proj.weight" in tensors else "layers.0"
    return replace(
        config,
        has_embedding=_EMBEDDING in tensors,
        attention_bias=config.attention_bias or f"{first}.self_attn.q_proj.bias" in tensors,
        output_bias=f"{first}.self_attn.o_proj.bias" in tensors,
        mlp_bias=config.mlp_bias or f"{first}.mlp.up_proj.bias" in tensors,
        fc_bias=config.fc_bias or "fc.bias" in tensors,
        qk_norm=config.qk_norm or (layout.has_qk_norm is None and f"{first}.self_attn.q_norm.weight" in tensors),
    )


def _eagle3(tensors: dict[str, Tensor], config: EagleConfig, path: Path, needs_t2d: bool) -> EagleCell:
    _check_features(tensors, config, path)
    whole_vocabulary = config.draft_vocab_size == config.vocab_size
    if whole_vocabulary and _OUTPUT not in tensors:
        if config.ties_output and config.has_embedding:
            tensors[_OUTPUT] = tensors[_EMBEDDING]
        elif not config.ties_output:
            config = replace(config, shares_output=True)
    shares_output = config.shares_output and _OUTPUT not in tensors
    if config.hidden_size != config.target_hidden_size and (shares_output or not config.has_embedding):
        missing, use = (_OUTPUT, "output matrix") if shares_output else (_EMBEDDING, "embeddings")
        raise CheckpointError(
            f"{path} lacks {missing}: a head of hidden size {config.hidden_size} cannot use its target's {use} of size "
            f"{config.target_hidden_size}"
        )
    is_made = complete_mapping(tensors, config.draft_vocab_size, config.vocab_size, needs_t2d)
    with torch.device("meta"):
        expected = EagleCell(config).state_dict()
    if shares_output:
        expected.pop(_OUTPUT)
    check_tensors(tensors, {key: tuple(value.shape) for key, value in expected.items()}, path)
    check_mapping(tensors["d2t"], tensors["t2d"], path, is_made)
    cell = EagleCell(replace(config, shares_output=shares_output))
    cell.load_state_dict(tensors, strict=not shares_output)  # the keys are checked
    return cell


def _check_features(tensors: Mapping[str, Tensor], config: EagleConfig, path: Path) -> None:
    """Raise CheckpointError if ``fc`` reads another number of layers than the config names."""
    fc, width = tensors.get("fc.weight"), config.target_hidden_size
    if config.feature_layers is None or fc is None or fc.dim() != 2 or fc.shape[1] == config.num_features * width:
        return
    raise CheckpointError(
        f"fc.weight in {path} reads {fc.shape[1] / width:g} layers of the target, but hidden_states"
        f"{list(config.feature_layers)} are named; engines disagree by one on what a config's ids mean, and the option "
        "layers names the right entries, such as layers=2+16+29"
    )


def _eagle1(tensors: dict[str, Tensor], config: EagleConfig, path: Path) -> FeatureCell:
    config = replace(config, draft_vocab_size=config.vocab_size)
    if config.hidden_size != config.target_hidden_size:
        raise CheckpointError(f"an EAGLE-1 or 2 head has its target's hidden size, got {config.hidden_size} in {path}")
    wrong = [*config.flags(), *(["layer ids"] if config.feature_layers else [])]
    if wrong:
        raise CheckpointError(
            f"the config of {path} has {', '.join(wrong)}, but its tensors are an EAGLE-1 or 2 head's"
        )
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
    dtype = str(cell.dtype).removeprefix("torch.")
    config = replace(cell.config, torch_dtype=dtype, shares_output=shares_output).to_dict()
    if base:
        config["specdec_target"] = dict(base)
    tensors = {key: value for key, value in cell.state_dict().items() if not (shares_output and key == _OUTPUT)}
    save_tensors(tensors, config, Path(path))
