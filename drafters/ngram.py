"""Prompt lookup as a token tree: continuations of what the row has already said, by a variable-order n-gram model.

Prompt lookup (Saxena, 2023) copies what followed one earlier occurrence of the last few tokens. Here every context of
up to ``max_order`` tokens knows its latest successors; a tree is grown best-first over their blended probabilities, so
that several continuations share the budget, and drafted tokens extend the context, so that a repetition is continued
past the end of the text. The index grows by a few dictionary entries for each emitted token; nothing is rescanned, and
no context keeps more than its latest few successors, so that a step costs the same whatever the text and its length.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from specdec.budget.hit_counts import count_trial
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree

Context = tuple[int, ...]

_FADING = 0.7  # what the count of a successor keeps each time that its context occurs again
# Distinct successors that a context keeps. What is dropped was last seen as many occurrences ago or more: all of that
# together weighs at most 0.7 ** 32 / 0.3, less than 1e-4, of what the newest weighs.
MAX_SUCCESSORS = 32


@dataclass(slots=True)
class EscapeRates:
    """How often the successors known to a context of each length held the token that came; learned as rows go."""

    hits: list[float]
    trials: list[float]

    @classmethod
    def prior(cls, max_order: int) -> EscapeRates:
        """Worth a few observations: a context of n tokens is right more often the longer it is."""
        rates = [0.0, *(1 - 0.75 * 0.6 ** (n - 1) for n in range(1, max_order + 1))]
        return cls([8 * r for r in rates], [8.0] * (max_order + 1))

    def rate(self, order: int) -> float:
        return self.hits[order] / self.trials[order]

    def learn(self, order: int, is_hit: bool) -> None:
        count_trial(self.hits, self.trials, order, is_hit)


@dataclass(slots=True)
class ContextIndex:
    """The latest successors of every context of 1 to ``max_order`` tokens in one row, with their fading counts."""

    max_order: int
    tokens: list[int] = field(default_factory=list)
    successors: list[dict[Context, dict[int, float]]] = field(init=False)  # the latest seen last

    def __post_init__(self) -> None:
        self.successors = [{} for _ in range(self.max_order + 1)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` and count each as a successor of the contexts before it."""
        latest = tuple(self.tokens[-self.max_order :])
        for token in tokens:
            for order in range(1, len(latest) + 1):
                contexts, context = self.successors[order], latest[-order:]
                counts = contexts.get(context)
                if counts is None:
                    contexts[context] = {token: 1.0}
                else:
                    _count(counts, token)
            latest = (*latest, token)[-self.max_order :]
        self.tokens += tokens

    def lookup(self, context: Context) -> Iterator[tuple[int, dict[int, float]]]:
        """(order, successors) for the suffixes of ``context`` that have occurred before, longest first."""
        for order in range(min(self.max_order, len(context)), 0, -1):
            counts = self.successors[order].get(context[-order:])
            if counts:
                yield order, counts


def _count(counts: dict[int, float], token: int) -> None:
    """Count ``token`` among the successors ``counts`` of one context: the others fade, and a list too long loses its oldest."""
    count = counts.pop(token, 0.0)
    for other in counts:
        counts[other] *= _FADING
    counts[token] = count * _FADING + 1.0
    if len(counts) > MAX_SUCCESSORS:
        del counts[next(iter(counts))]


@dataclass(slots=True)
class NgramDrafter(Drafter):
    """Drafts from the row's own text; no model, no training.

    Args:
        max_order: the longest context that is looked up, in tokens.
        min_prob: a node whose estimated probability of being accepted is lower is not worth its place.
        min_gain: expected accepted tokens below which the step is not worth a larger pass at all.
    """

    max_order: int = 4
    min_prob: float = 0.02
    min_gain: float = 0.1
    name: str = "ngram"
    _indices: dict[Row, ContextIndex] = field(default_factory=dict)
    _rates: EscapeRates = field(init=False)

    def __post_init__(self) -> None:
        if self.max_order < 1:
            raise ValueError(f"max_order must be at least 1 token, got {self.max_order}")
        self._rates = EscapeRates.prior(self.max_order)

    def begin(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._indices[row] = index = ContextIndex(self.max_order)
            index.extend(row.tokens)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        return [self._grow(self._indices[row], limit) for row, limit in zip(rows, limits, strict=True)]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        for row in rows:
            index = self._indices[row]
            for token in row.tokens[len(index.tokens) :]:
                self._learn(index, token)
                index.extend((token,))

    def end(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._indices.pop(row, None)

    def _learn(self, index: ContextIndex, token: int) -> None:
        """Shorter contexts matter only where longer ones did not know the token: they are judged on those cases."""
        for order, counts in index.lookup(tuple(index.tokens[-self.max_order :])):
            self._rates.learn(order, token in counts)
            if token in counts:
                return

    def _successors(self, index: ContextIndex, context: Context, prob: float) -> dict[int, float]:
        """The probability of each known next token below a node of probability ``prob``, where it is worth its place.

        What one order does not know is left to the shorter one.
        """
        probs: dict[int, float] = {}
        for order, counts in index.lookup(context):
            new = {token: count for token, count in counts.items() if token not in probs} if probs else counts
            total = sum(new.values())
            if total == 0:
                continue
            share = prob * self._rates.rate(order)
            for token, count in new.items():
                probs[token] = share * count / total
            prob -= share
            if prob < self.min_prob:
                break
        return probs

    def _grow(self, index: ContextIndex, limit: Limit) -> TokenTree:
        """Best-first: always add the most probable candidate, then offer its own successors."""
        tokens, parents = [index.tokens[-1]], [-1]
        contexts = [tuple(index.tokens[-self.max_order :])]
        depths, gain = [0], 0.0
        estimates = [1.0]
        taken: set[int] = set()
        heap: list[tuple[float, int, int]] = []  # (-probability, parent, token)

        def offer(node: int, prob: float) -> None:
            if depths[node] < limit.depth:
                for token, estimate in self._successors(index, contexts[node], prob).items():
                    if estimate >= self.min_prob:
                        heapq.heappush(heap, (-estimate, node, token))

        offer(0, 1.0)
        while heap and len(tokens) <= limit.nodes:
            negative, parent, token = heapq.heappop(heap)
            if limit.chain_only and parent in taken:
                continue
            taken.add(parent)
            gain -= negative
            estimates.append(-negative)
            tokens.append(token)
            parents.append(parent)
            contexts.append((*contexts[parent], token)[-self.max_order :])
            depths.append(depths[parent] + 1)
            offer(len(tokens) - 1, -negative)
        if gain < self.min_gain:
            return TokenTree.root(tokens[0])
        return TokenTree(tuple(tokens), tuple(parents), estimates=tuple(estimates))


def build(context: DraftContext) -> Drafter:
    """Options: max_order, min_prob, min_gain."""
    return NgramDrafter(**context.options)
