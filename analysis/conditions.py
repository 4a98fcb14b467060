"""Under which conditions a run was made: speeds of different ones are never mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SETTINGS = ("batch_size", "temperature", "max_new_tokens", "max_nodes", "adaptive", "accelerate", "verifier")


def comparable(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for speeds to be comparable, by name."""
    settings, machine = provenance.get("settings") or {}, provenance.get("machine") or {}
    models = provenance.get("models") or {}
    facts = {f"{role} model": (model or {}).get("id") for role, model in models.items()}
    facts |= {name: provenance.get(name) for name in ("dtype", "device", "threads")}
    facts |= {name: machine.get(name) for name in ("cpu", "gpus")}
    facts["cuda_graphs"] = bool(settings.get("cuda_graphs"))  # older files do not say
    return facts | {name: settings.get(name) for name in _SETTINGS}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the conditions in which two runs, given by their provenance, differ."""
    a, b = comparable(one), comparable(other)
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]
