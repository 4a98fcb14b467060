"""Races the configurations that promise most on real prompts, in turn and in pairs, and tells the fastest.

Before it, specdec.tune.recording writes down what drafters do, and specdec.tune.prediction replays that at every size.
"none" always takes part. Seconds are wall time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import numpy as np

from specdec.budget.adaptive import make_budget
from specdec.budget.costs import PassCosts
from specdec.tune.prediction import Candidate, Interval
from specdec.tune.recording import NONE
from specdec.tune.setting import Setting, Tokens

MODEL_CHAINS = ("model:num_tokens=8,min_confidence=0.0", "model")
MODEL_TREES = ("model:shape=best-first", "model:shape=3x2x1")
_ADAPTIVE_BONUS = 1.03
_NUM_RESAMPLES = 1000


def finalists(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best ``count`` of the best of each drafter, once adaptive and once fixed; "none" is always among them.

    Prediction errs more between drafters than between sizes of one: so no drafter takes all places.
    """
    firsts: dict[tuple[str, bool], Candidate] = {}
    for candidate in candidates:
        if candidate.drafter != NONE:
            firsts.setdefault((candidate.drafter, candidate.adaptive), candidate)
    return [next(c for c in candidates if c.drafter == NONE), *list(firsts.values())[: count - 1]]


def race(
    setting: Setting,
    racers: Sequence[Candidate],
    batches: Sequence[Sequence[Tokens]],
    curve: Mapping[int, float],
    is_over: Callable[[], bool] = lambda: False,
) -> Candidate:
    """Run each batch with every racer in turn until batches or time run out, and return the fastest.

    A racer drops out when the 95 % bootstrap interval of its paired ratio to the leader lies wholly below 1, by whole
    answers. Results are left in ``racers``; the first one must be "none", with which all are compared. What is predicted
    is then told for the batches that were raced: ``batches`` begin with those that were recorded, in their order.
    """
    num_rows = max(map(len, batches))
    decoders = [
        setting.decoder(
            setting.drafter(racer.drafter),
            make_budget(racer.max_nodes, racer.adaptive, PassCosts.seeded({num_rows: curve})),
        )
        for racer in racers
    ]
    rates: list[list[float]] = [[] for _ in racers]  # logarithms of tokens a second, of whole answers
    decode: list[list[float]] = [[] for _ in racers]  # of decoding alone; NaN: an answer ended with its first pass
    for number, prompts in enumerate(batches):
        order = [(number + i) % len(racers) for i in range(len(racers))]
        for i in (i for i in order if not racers[i].is_dropped):
            answer = setting.answer(decoders[i], prompts)
            rates[i].append(float(np.log(answer.whole_rate)))
            decode[i].append(float(np.log(answer.decode_rate)) if answer.decode_rate else float("nan"))
        _judge(racers, rates, decode)
        if is_over() or (sum(not racer.is_dropped for racer in racers) == 1):
            break
    for racer, own in zip(racers, rates, strict=True):
        racer.expect(len(own))
    left = [racer for racer in racers if not racer.is_dropped]
    return max(left, key=_merit)


def _merit(candidate: Candidate) -> float:
    """Its speed; of nearly equal ones the adaptive is taken, which follows other prompts than these too."""
    return (candidate.measured[0] if candidate.measured else 0.0) * (_ADAPTIVE_BONUS if candidate.adaptive else 1.0)


def _judge(racers: Sequence[Candidate], rates: Sequence[Sequence[float]], decode: Sequence[Sequence[float]]) -> None:
    for racer, own, own_decode in zip(racers, rates, decode, strict=True):
        if not racer.is_dropped:
            racer.measured = _ratio(own, rates[0])
            pairs = [pair for pair in zip(own_decode, decode[0], strict=False) if not np.isnan(pair).any()]
            racer.measured_decode = _ratio(*zip(*pairs, strict=True)) if pairs else None
    active = [i for i, racer in enumerate(racers) if not racer.is_dropped]
    leader = max(active, key=lambda i: mean(rates[i]))
    for i in active:
        # "none" stays: everybody is compared with it.
        if i not in (0, leader) and len(rates[i]) >= 4 and _ratio(rates[i], rates[leader])[2] < 1:
            racers[i].is_dropped = True


def _ratio(own: Sequence[float], other: Sequence[float]) -> Interval:
    """The geometric mean of paired ratios and its 95 % bootstrap interval."""
    logs = np.asarray(own) - np.asarray(other[: len(own)])
    picks = np.random.default_rng(0).integers(len(logs), size=(_NUM_RESAMPLES, len(logs)))
    low, high = np.exp(np.percentile(logs[picks].mean(1), [2.5, 97.5]))
    return float(np.exp(logs.mean())), float(low), float(high)
