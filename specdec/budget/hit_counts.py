"""Counts of hits and trials in which what is long past counts less: how every learned rate in this package is kept."""

from __future__ import annotations

MEMORY = 400.0  # trials beyond which all counts of a rate are halved


def count_trial(hits: list[float], trials: list[float], index: int, is_hit: bool, memory: float = MEMORY) -> None:
    """Count one trial of the rate ``hits[index] / trials[index]``; beyond ``memory`` trials both counts are halved."""
    hits[index] += is_hit
    trials[index] += 1
    if trials[index] > memory:
        hits[index] /= 2
        trials[index] /= 2
