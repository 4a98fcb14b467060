"""The rotary positions that a head's config.json asks for, in transformers' newer and older spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specdec.drafters.heads.eagle_keys import Keys, refused
from specdec.errors import CheckpointError

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
_THETA = 10000.0
_YARN = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate",
)  # fmt: skip
_USED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": _YARN,
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_NAMES = ("rope_type", "type", "rope_theta")
# With the same position along all axes, as in text, these are plain rotary positions.
_AXES = ("mrope_section", "mrope_interleaved")


def read_rope(keys: Keys) -> dict[str, Any]:
    """transformers' ``rope_parameters``: from that key, or from ``rope_theta`` and ``rope_scaling``.

    Raises:
        CheckpointError: a key that the kind of scaling does not know, or two spellings that contradict each other.
    """
    # Heads trained here turn all of each head, and used to name their target's factor all the same.
    is_ours = keys.get("specdec_target") is not None
    newer, older = (_plain(name, keys.get(name, {}), is_ours) for name in ("rope_parameters", "rope_scaling"))
    rope = newer or older
    if newer and older:
        _check_agreement(newer, older)
    theta = keys.number("rope_theta", 0)
    if theta and theta != rope.setdefault("rope_theta", theta):
        raise CheckpointError(
            f"rope_theta in the head's config.json is {theta}, but {rope['rope_theta']} in rope_parameters: remove one"
        )
    _check_partial(keys.get("partial_rotary_factor", 1))
    original = keys.get("original_max_position_embeddings")
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", _THETA)
    if original is not None and "original_max_position_embeddings" in _USED.get(rope["rope_type"], ()):
        rope.setdefault("original_max_position_embeddings", original)
    return rope


def head_rope(target: Mapping[str, Any]) -> dict[str, Any]:
    """What a new head takes over of its target's ``rope_parameters``: it turns all of each head, in text."""
    return {key: value for key, value in target.items() if key not in (*_AXES, "partial_rotary_factor")}


def _plain(name: str, raw: Any, is_ours: bool) -> dict[str, Any]:
    """``raw`` with one spelling of the type, and without what has no influence."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{name} in the head's config.json must be an object, got {raw!r}")
    held = {key: value for key, value in raw.items() if value is not None}
    kinds = {str(held[key]) for key in ("rope_type", "type") if key in held}
    if "mrope" in kinds or any(key in held for key in _AXES):
        kinds = (kinds - {"mrope"}) or {"default"}
    if len(kinds) > 1:
        raise CheckpointError(f"{name} in the head's config.json names two types: {' and '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    partial = held.pop("partial_rotary_factor", 1)
    if not is_ours:
        _check_partial(partial, name)
    rope = {"rope_type": kind} if held else {}
    for key, value in held.items():
        if key in (*_NAMES, *_AXES):
            continue
        if key in _USED.get(kind, (key,)):
            rope[key] = value
        elif not (key == "factor" and value == 1):
            raise refused(f"{name}.{key}", value, f"positions of rope_type {kind!r} do not know it")
    return rope | ({"rope_theta": Keys(held).number("rope_theta", _THETA)} if "rope_theta" in held else {})


def _check_agreement(newer: Mapping[str, Any], older: Mapping[str, Any]) -> None:
    wrong = [key for key in older if newer.get(key) != older[key]]
    if wrong:
        raise CheckpointError(
            f"rope_parameters and rope_scaling in the head's config.json disagree on {wrong[0]}: "
            f"{newer.get(wrong[0])!r} and {older[wrong[0]]!r}; remove one of them"
        )


def _check_partial(factor: Any, where: str = "") -> None:
    if factor != 1:
        key = f"{where}.partial_rotary_factor" if where else "partial_rotary_factor"
        raise refused(key, factor, "all of each head is turned", (1,))
