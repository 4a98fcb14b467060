"""Medians and rising curves: estimates that one wild time does not move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """The value at which half of the weight is reached."""
    ranked = sorted(values)
    half, reached = sum(weight for _, weight in ranked) / 2, 0.0
    for value, weight in ranked:
        reached += weight
        if reached >= half - 1e-12:
            return value
    raise ValueError("no values")


def rising(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """(size, seconds, weight) with seconds averaged where they fall with size: one lucky time must not decide."""
    pools: list[tuple[float, int, list[float]]] = []  # mean seconds, weight, sizes
    for size, seconds, weight in points:
        sizes = [size]
        while pools and pools[-1][0] > seconds:
            mean, other, before = pools.pop()
            seconds = (mean * other + seconds * weight) / (other + weight)
            weight += other
            sizes = before + sizes
        pools.append((seconds, weight, sizes))
    return [(size, seconds) for seconds, _, sizes in pools for size in sizes]
