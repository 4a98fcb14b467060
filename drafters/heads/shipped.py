"""Where trained drafters come from: a path, or the heads that are shipped for the default target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from specdec.cpu.packed_linear import is_packed, packing_fault
from specdec.drafters.heads.checkpoint_io import CONFIG, read_json
from specdec.engine.model_state import ModelState
from specdec.engine.offload import loaded
from specdec.errors import UnsupportedModelError
from specdec.interfaces import ModelTarget, Target

T = TypeVar("T")

SHIPPED = Path(__file__).parents[1] / "pretrained"
_NUM_ROWS = 16  # embeddings that a fingerprint looks at
_TOLERANCE = 0.02  # their norms, relative: the same weights in another precision are far below it


def require_causal_lm(target: Target, drafter: str) -> ModelTarget:
    """``target`` if it can show hidden states.

    Raises:
        UnsupportedModelError: it cannot.
    """
    if not isinstance(target, ModelTarget):
        raise UnsupportedModelError(f"drafter {drafter!r} reads hidden states, which {type(target).__name__} has not")
    return target


def target_facts(model: Any) -> dict[str, Any]:
    """What a head's config says of the transformers model it was trained for: sizes, and a fingerprint.

    The fingerprint is the norms of a few embeddings, which survive a change of precision.
    """
    config = model.config.get_text_config()
    with loaded(model.get_input_embeddings()) as embeddings:
        weight = embeddings.weight
        rows = torch.linspace(0, len(weight) - 1, _NUM_ROWS).long()
        norms = weight.detach()[rows.to(weight.device)].float().norm(dim=-1)
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "fingerprint": [float(f"{norm:.5g}") for norm in norms.tolist()],
    }


def find(drafter: str, shipped: str, target: ModelTarget, path: object) -> Path:
    """The checkpoint at ``path``, or without one the folder ``shipped``, if it was made for ``target``.

    Raises:
        UnsupportedModelError: no path was given, and the shipped head is not there or belongs to another model.
    """
    if path is not None:
        return Path(str(path)).expanduser()
    folder = SHIPPED / shipped
    if not folder.is_dir():
        raise UnsupportedModelError(
            f"no head for drafter {drafter!r} is shipped with this installation; {_advice(drafter)}"
        )
    if fault := shipped_fault(folder, target):
        raise UnsupportedModelError(
            f"the shipped head {shipped} was trained for another model ({fault}); {_advice(drafter)}"
        )
    return folder


def shipped_fault(folder: Path, target: ModelTarget) -> str:
    """How the target that the shipped ``folder`` was made for differs from ``target``; empty if it does not."""
    return mismatch(read_json(folder / CONFIG).get("specdec_target") or {}, target_facts(target.model))


def draft_dtype(target: ModelTarget) -> torch.dtype:
    """What a head runs in: the target's dtype, or bfloat16 beside a packed float32 target on a CPU that has it.

    Drafts decide how fast the text comes, never what it says, and on a CPU half the bytes is half the time.
    """
    dtype: torch.dtype = target.model.dtype
    if dtype is torch.float32 and is_packed(target.model) and not packing_fault(torch.bfloat16):
        return torch.bfloat16
    return dtype


def kept(target: ModelTarget, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What ``make`` makes for a target, made once for as long as the target's model lives.

    generate() builds its drafter at every call, which must not read and lay out a head's weights anew.
    """
    return ModelState.of(target.model).keep(key, make)


def version(path: Path) -> tuple[str, int]:
    """Changes when the checkpoint at ``path`` does."""
    files = [file for file in (*path.glob("*"), path) if file.is_file()]
    return str(path.absolute()), max((file.stat().st_mtime_ns for file in files), default=0)


def _advice(drafter: str) -> str:
    return (
        f"train one for your model with specdec train {drafter} --target MODEL, and use it as "
        f"{drafter}:path=DIR, or choose a drafter without training such as 'ngram'"
    )


def mismatch(trained: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """How the target that a head was ``trained`` for differs from the one ``actual``; empty if it does not."""
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if trained.get(key) != actual[key]:
            return f"{key} {trained.get(key)}, this model's is {actual[key]}"
    pairs = zip(trained.get("fingerprint", ()), actual["fingerprint"], strict=False)
    if any(abs(a - b) > _TOLERANCE * max(abs(a), abs(b)) for a, b in pairs) or not trained.get("fingerprint"):
        return "same sizes, other weights"
    return ""
