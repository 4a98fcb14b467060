"""Where drafts are accepted and where they die.

The unit is an attempt: a kept node of a step's tree (the root or an accepted node), at which the target chose one token.
An attempt was proposed something if the tree had children there, and was met if one of them was kept. There is one
attempt for each emitted token. Rates in this file are met / proposed attempts, called conditional: everything before was
accepted. vLLM's rates by position divide by all drafts instead and are called unconditional.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.analysis.columns import Bools, Floats, Ints, Trace
from specdec.analysis.intervals import Estimate, ratio_of_sums
from specdec.analysis.nodes import sibling_ranks, tree_parents

TOKEN_CLASSES = ("word start", "word part", "number", "punctuation", "space", "other")


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts and ratios of one method, under vLLM's names; see specdec.stats.Stats."""

    name: str
    num_drafts: int  # passes of rows, empty drafts included
    num_draft_tokens: int
    num_accepted_tokens: int
    num_tokens: int
    mean_acceptance_length: Estimate  # tokens a row gains in one pass: 1 + accepted / drafts
    acceptance_rate: float  # accepted / drafted; a tree's divides by all its nodes
    num_accepted_tokens_per_pos: tuple[int, ...]
    acceptance_rate_per_pos: tuple[float, ...]  # unconditional: share of drafts with more than i accepted
    acceptance_histogram: tuple[int, ...]  # drafts with exactly i accepted
    draft_s: float
    score_s: float
    verify_s: float


@dataclass(frozen=True, slots=True)
class Attempts:
    """Columns of all attempts (K,), in the order of the trace's kept nodes."""

    step: Ints
    depth: Ints  # 0 at the root
    proposed: Bools  # the tree had children here, and the text did not end with this token
    met: Bools  # one of them was kept
    rank: Ints  # of the kept child among its siblings; -1 where none was kept
    position: Ints  # tokens of the answer before the one that was chosen here
    token: Ints  # the one that was emitted
    entropy: Floats  # nats, NaN where the trace does not tell
    confidence: Floats  # the drafter's highest among the children: its estimate, else what they were drawn with; or NaN


@dataclass(frozen=True, slots=True)
class Rate:
    """The conditional acceptance rate of some attempts."""

    key: str
    num_proposed: int
    num_met: int
    rate: Estimate


def summarise(trace: Trace) -> list[Summary]:
    """One summary for each method that has steps."""
    selected = ((name, trace.select(name)) for name in trace.names)
    return [_summary(name, own) for name, own in selected if len(own.steps)]


def mean_acceptance_length(trace: Trace) -> Estimate:
    """1 + accepted / drafts of all steps in ``trace``; its interval resamples questions."""
    steps = trace.steps
    return ratio_of_sums(*_by_question(trace, steps.num_accepted, np.ones(len(steps))), plus=1.0)


def attempts(trace: Trace) -> Attempts:
    """Every attempt of ``trace``."""
    steps = trace.steps
    lengths = steps.num_emitted
    step = np.repeat(np.arange(len(steps)), lengths)
    depth = np.arange(len(step)) - np.repeat(steps.kept_offsets[:-1], lengths)
    is_last = depth == lengths[step] - 1
    nodes = steps.nodes + steps.tree_offsets[step]  # numbered through all trees
    parents = tree_parents(trace)
    num_children = np.bincount(parents[parents >= 0], minlength=len(parents))
    # The text ended with this token: whether a draft of it would have been kept is not recorded.
    is_cut = is_last & steps.finished[step]
    rank = np.full(len(step), -1)
    rank[:-1][~is_last[:-1]] = sibling_ranks(trace)[nodes[1:][~is_last[:-1]]]
    starts = _starts(trace)
    nothing = np.full(len(step), np.nan)
    return Attempts(
        step=step,
        depth=depth,
        proposed=(num_children[nodes] > 0) & ~is_cut,
        met=~is_last,
        rank=rank,
        position=steps.position[step] + depth - starts[steps.label[step]],
        token=steps.tokens,
        entropy=nothing if steps.entropies is None else steps.entropies,
        confidence=_best_below(parents, _confidence(trace))[nodes],
    )


def by_depth(trace: Trace) -> list[Rate]:
    """Conditional rate at each depth: how often the token at depth i + 1 was met, given that a path reached i."""
    all_attempts = attempts(trace)
    return rates(
        trace,
        all_attempts,
        all_attempts.depth,
        [str(depth) for depth in range(_last(all_attempts.depth[all_attempts.proposed]))],
    )


def unconditional_by_depth(trace: Trace) -> list[Estimate]:
    """[i]: share of drafts, empty ones included, with more than i accepted tokens (vLLM's rate by position)."""
    accepted = trace.steps.num_accepted
    ones = np.ones(len(accepted))
    return [ratio_of_sums(*_by_question(trace, accepted > i, ones)) for i in range(int(accepted.max(initial=0)))]


def by_rank(trace: Trace) -> tuple[Floats, Ints]:
    """(D, R) how often the child of rank R was the kept one below a kept node of depth D that had children, and (D,)
    how many such nodes there were. The same table as that of ``specdec tune``; NaN where nothing was ever tried.
    """
    all_attempts = attempts(trace)
    tried = all_attempts.proposed
    shape = (_last(all_attempts.depth[tried]), _last(all_attempts.rank[tried & all_attempts.met]))
    visits = np.bincount(all_attempts.depth[tried], minlength=shape[0])
    hits = np.zeros(shape)
    met = tried & all_attempts.met
    np.add.at(hits, (all_attempts.depth[met], all_attempts.rank[met]), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return hits / visits[:, None], visits


def by_category(trace: Trace) -> list[Rate]:
    all_attempts = attempts(trace)
    names = trace.categories
    codes = np.array([names.index(label.category) for label in trace.labels])
    return rates(trace, all_attempts, codes[trace.steps.label[all_attempts.step]], names)


def by_token_class(trace: Trace) -> list[Rate]:
    """By what kind of token the target chose; empty where the trace tells no texts."""
    if not any(run.texts for run in trace.runs):
        return []
    all_attempts = attempts(trace)
    run_of = np.array([label.run for label in trace.labels])[trace.steps.label[all_attempts.step]]
    classes = np.zeros(len(all_attempts.token), np.int64)
    for number, run in enumerate(trace.runs):
        mine = run_of == number
        tokens, where = np.unique(all_attempts.token[mine], return_inverse=True)
        kinds = [TOKEN_CLASSES.index(token_class(run.texts.get(int(token), ""))) for token in tokens]
        classes[mine] = np.array(kinds, np.int64)[where]
    return rates(trace, all_attempts, classes, TOKEN_CLASSES)


def by_entropy(trace: Trace, edges: Sequence[float] = (0.05, 0.25, 0.5, 1, 2, 3, 4)) -> list[Rate]:
    """By the entropy (nats) of the target's distribution; empty where the trace does not tell it."""
    return _binned(trace, lambda all_attempts: all_attempts.entropy, edges)


def by_confidence(trace: Trace, edges: Sequence[float] = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)) -> list[Rate]:
    """By how sure the drafter was; empty where it does not tell."""
    return _binned(trace, lambda all_attempts: all_attempts.confidence, edges)


def by_position(trace: Trace, edges: Sequence[float] = (8, 16, 32, 64, 128, 256, 512)) -> list[Rate]:
    """By how many tokens of the answer stood before."""
    return _binned(trace, lambda all_attempts: all_attempts.position.astype(np.float64), edges)


def rates(trace: Trace, all_attempts: Attempts, codes: Ints, keys: Sequence[str]) -> list[Rate]:
    """The rate of each key that was proposed anything: attempt i counts for ``keys[codes[i]]``."""
    result = []
    for code, key in enumerate(keys):
        tried = all_attempts.proposed & (codes == code)
        if tried.any():
            met = tried & all_attempts.met
            sums = _by_question(trace, met, tried, all_attempts.step)
            result.append(Rate(key, int(tried.sum()), int(met.sum()), ratio_of_sums(*sums)))
    return result


def token_class(text: str) -> str:
    """One of TOKEN_CLASSES."""
    word = text.strip()
    if not word:
        return "space" if text else "other"
    if word[0].isdigit():
        return "number"
    if word[0].isalpha():
        return "word start" if text[0].isspace() else "word part"
    return (
        "punctuation"
        if all(character in string.punctuation or not character.isalnum() for character in word)
        else "other"
    )


def _binned(trace: Trace, value: Callable[[Attempts], Floats], edges: Sequence[float]) -> list[Rate]:
    all_attempts = attempts(trace)
    values = value(all_attempts)
    codes = np.where(np.isnan(values), -1, np.digitize(values, edges))
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return rates(trace, all_attempts, codes, [f"below {edges[0]:g}", *inner, f"from {edges[-1]:g}"])


def _summary(name: str, trace: Trace) -> Summary:
    steps = trace.steps
    accepted = steps.num_accepted
    histogram = np.bincount(accepted)
    per_pos = len(steps) - np.cumsum(histogram)[:-1]
    num_drafted, num_accepted = int(steps.num_drafted.sum()), int(accepted.sum())
    return Summary(
        name=name,
        num_drafts=len(steps),
        num_draft_tokens=num_drafted,
        num_accepted_tokens=num_accepted,
        num_tokens=len(steps.tokens),
        mean_acceptance_length=mean_acceptance_length(trace),
        acceptance_rate=num_accepted / num_drafted if num_drafted else 0.0,
        num_accepted_tokens_per_pos=tuple(per_pos.tolist()),
        acceptance_rate_per_pos=tuple((per_pos / len(steps)).tolist()),
        acceptance_histogram=tuple(histogram.tolist()),
        draft_s=float(steps.draft_s.sum()),
        score_s=float(steps.score_s.sum()),
        verify_s=float(steps.verify_s.sum()),
    )


def _by_question(
    trace: Trace, over: NDArray[Any], under: NDArray[Any], step: Ints | None = None
) -> tuple[Floats, Floats]:
    """Both columns, of steps or of what belongs to ``step``, added up for each question."""
    questions = {
        key: i for i, key in enumerate(dict.fromkeys((label.run, label.question_id) for label in trace.labels))
    }
    codes = np.array([questions[label.run, label.question_id] for label in trace.labels], np.int64)
    labels = trace.steps.label if step is None else trace.steps.label[step]
    where = codes[labels] if len(codes) else labels
    over, under = (np.bincount(where, values, len(questions)).astype(np.float64) for values in (over, under))
    return over, under


def _confidence(trace: Trace) -> Floats:
    """(M,) the drafter's estimate of each node, or where it made none the probability that it drew the node with."""
    steps = trace.steps
    nothing = np.full(len(steps.tree_tokens), np.nan)
    guessed, drawn = (nothing if values is None else values for values in (steps.estimates, steps.draft_probs))
    return np.where(np.isnan(guessed), drawn, guessed)


def _best_below(parents: Ints, estimates: Floats) -> Floats:
    """(M,) the highest estimate among each node's children, NaN if there is none."""
    best = np.full(len(parents), np.nan)
    inner = parents >= 0
    np.fmax.at(best, parents[inner], estimates[inner])
    return best


def _starts(trace: Trace) -> Ints:
    """(labels,) absolute position of the first token of each answer."""
    starts = np.full(len(trace.labels), np.iinfo(np.int64).max)
    np.minimum.at(starts, trace.steps.label, trace.steps.position)
    return starts


def _last(values: Ints) -> int:
    return int(values.max(initial=-1)) + 1
