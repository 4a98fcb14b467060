"""The layouts of a head's config.json, brought to one form: which convention each follows is known here alone.

Flat ones come from SafeAILab's EAGLE, SpecForge, AngelSlim and vLLM, with ``eagle_config`` inside from SGLang and
ModelOpt; the nested one from the library speculators, whose ``transformer_layer_config`` is a transformers config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.drafters.heads.eagle_keys import Keys
from specdec.errors import CheckpointError

_EAGLE3 = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM")
_EAGLE1 = ("EagleLlamaForCausalLM", "LlamaForCausalLMEagle")
# Heads of all versions were published under the name of their base class, too.
_KNOWN = (*_EAGLE3, *_EAGLE1, "LlamaForCausalLM")
_SPECULATORS, _LAYER = "speculators_model_type", "transformer_layer_config"
_IDS, _NESTED = "eagle_aux_hidden_state_layer_ids", "eagle_config"
_USE_AUX = "use_aux_hidden_state"


@dataclass(frozen=True, slots=True)
class Layout:
    """A config.json in the flat form.

    ``feature_layers`` are entries of the target's ``hidden_states``, which are read side by side in rising order,
    because engines collect them while the target runs; None: nothing is said.
    """

    values: Mapping[str, Any]
    feature_layers: tuple[int, ...] | None
    reads_last_only: bool  # no features: the first state is the target's last hidden state
    is_eagle1: bool | None  # None: the tensors decide
    has_qk_norm: bool | None  # whether queries and keys are normalised; None: the tensors decide
    needs_t2d: bool  # writers of ``eagle_config`` store d2t alone


def flattened(config: Mapping[str, Any], layers: Sequence[int] | None = None) -> Layout:
    """The flat form of any known layout; ``layers`` take the place of the layer ids.

    Raises:
        CheckpointError: another layout or network, or layer ids that contradict each other.
    """
    chosen = None if layers is None else tuple(layers)
    return _speculators(config, chosen) if _SPECULATORS in config else _flat(config, chosen)


def _flat(config: Mapping[str, Any], chosen: tuple[int, ...] | None) -> Layout:
    names = config.get("architectures") or []
    unknown = [name for name in names if name not in _KNOWN]
    if unknown:
        raise CheckpointError(f"the head's architecture {unknown[0]} is not known here; known are {', '.join(_KNOWN)}")
    nested = config.get(_NESTED) or {}
    values = _merged(config, nested)
    use_aux = values.pop(_USE_AUX, None)
    last_only = use_aux is not None and not Keys({_USE_AUX: use_aux}).flag(_USE_AUX)
    layer_ids = (config.get(_IDS), nested.get(_IDS))
    qk_norm = True if _qk_norm_flag(values) or "Eagle3Qwen3ForCausalLM" in names else None
    return Layout(
        values,
        None if last_only else chosen or _flat_layers(*layer_ids),
        last_only,
        True if any(name in _EAGLE1 for name in names) else None,
        qk_norm if qk_norm or config.get("model_type") == "qwen3" else False,
        needs_t2d=not nested,
    )


def _speculators(config: Mapping[str, Any], chosen: tuple[int, ...] | None) -> Layout:
    kind, layer = config[_SPECULATORS], config.get(_LAYER)
    if kind not in ("eagle3", "eagle"):
        raise CheckpointError(
            f"{_SPECULATORS} {kind!r} in the head's config.json is another kind of drafter: eagle3 and eagle are known here"
        )
    if not isinstance(layer, Mapping) or layer.get("model_type") not in ("llama", "qwen3"):
        model_type = layer.get("model_type") if isinstance(layer, Mapping) else layer
        raise CheckpointError(
            f"{_LAYER}.model_type in the head's config.json must be 'llama' or 'qwen3', the layers known here, got {model_type!r}"
        )
    if kind == "eagle3" and config.get("norm_before_residual") is None:
        raise CheckpointError(
            "the head's config.json lacks norm_before_residual, and readers of its layout disagree on what that means: "
            "write true or false into it, whichever the head was trained with"
        )
    own = {key: value for key, value in config.items() if key not in (_LAYER, "tie_word_embeddings")}
    values = {**layer, **own, "model_type": layer["model_type"]}
    ids = values.pop(_IDS, None)
    qk_norm = layer["model_type"] == "qwen3" or _qk_norm_flag(values)
    return Layout(values, chosen or _entries(ids, 0), False, kind == "eagle", qk_norm, needs_t2d=True)


def _qk_norm_flag(values: dict[str, Any]) -> bool:
    return Keys({name: values.pop(name, None) for name in ("qk_norm", "use_qk_norm")}).flag("qk_norm", "use_qk_norm")


def _merged(config: Mapping[str, Any], nested: Any) -> dict[str, Any]:
    """``config`` with what stands in its ``eagle_config``, but the layer ids."""
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"{_NESTED} in the head's config.json must be an object, got {nested!r}")
    values = {key: value for key, value in config.items() if key not in (_IDS, _NESTED)}
    for key, value in nested.items():
        if key == _IDS or value is None:
            continue
        if values.get(key, value) != value:
            raise CheckpointError(
                f"{key} in the head's config.json is {values[key]!r}, but {value!r} in its {_NESTED}: remove one of them"
            )
        values[key] = value
    return values


def _flat_layers(outer: Any, nested: Any) -> tuple[int, ...] | None:
    """vLLM counts the ids beside the sizes from the embeddings on; SGLang those in ``eagle_config`` from layer 0's output."""
    first, second = _entries(outer, 0), _entries(nested, 1)
    if first and second and first != second:
        raise CheckpointError(
            f"the head's config.json names its target's layers twice, {outer} and {nested} in {_NESTED}: engines disagree "
            f"by one on what ids mean, and these are hidden_states{list(first)} and hidden_states{list(second)}; name the "
            "right ones with the option layers, such as eagle:path=DIR,layers=2+16+29"
        )
    return first or second


def _entries(ids: Any, offset: int) -> tuple[int, ...] | None:
    """Layer ``ids`` as entries of ``hidden_states``, in rising order; None if there are none."""
    if ids is None or ids == []:
        return None
    is_list = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not is_list or len(set(ids)) < len(ids) or min(ids) + offset < 0:
        raise CheckpointError(f"{_IDS} in the head's config.json must be different layer numbers, got {ids!r}")
    return tuple(sorted(i + offset for i in ids))
