"""Suffix trees over the row's own text and over earlier outputs (Oliaro et al., 2024), through arctic-inference.

The library answers what followed the last m tokens wherever they occurred before, for any m. Here the longest match
and a few shorter ones are asked of both stores and united into one tree: the estimate of a node is the sum over the
matches that hold it, each weighted by what longer ones leave open. How often a match of m tokens knows the next one is
learned as rows go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from specdec.drafters.ngram import EscapeRates
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree

_MAX_LENGTH = 12  # longer matches share one acceptance rate
_SHORTER = (24, 16, 12, 8, 6, 4, 3, 2, 1)  # matches tried below the longest
_MAX_MATCHES = 3  # asked of each store
_READER = -1  # the request that reads the store of earlier outputs


@dataclass(frozen=True, slots=True)
class _Match:
    """What followed the last ``length`` tokens before; parents are earlier nodes, -1: the row's newest token."""

    length: int
    tokens: list[int]
    parents: list[int]
    shares: list[float]  # of a node among its siblings
    children: dict[int, dict[int, int]]  # node -> token -> child

    @classmethod
    def of(cls, draft: Any) -> _Match:
        tokens, parents, probs = list(draft.token_ids), list(draft.parents), list(draft.probs)
        totals: dict[int, float] = {}
        children: dict[int, dict[int, int]] = {}
        for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
            totals[parent] = totals.get(parent, 0.0) + probs[node]
            children.setdefault(parent, {})[token] = node
        shares = [prob / totals[parent] for prob, parent in zip(probs, parents, strict=True)]
        return cls(draft.match_len, tokens, parents, shares, children)


@dataclass(slots=True)
class SuffixDrafter(Drafter):
    """Drafts from the row's own text and from earlier outputs; no model, no training.

    Every node is picked with certainty.

    Args:
        max_depth: the longest match and what follows it, in tokens together.
        min_prob: a node whose estimated probability of being accepted is lower is not worth its place.
        min_gain: expected accepted tokens below which the step is not worth a larger pass at all.
        max_cached: earlier outputs that are kept for all rows, the oldest leaving first; 0: none.

    Raises:
        ValueError: a value out of its range, or arctic-inference is not installed.
    """

    max_depth: int = 64
    min_prob: float = 0.05
    min_gain: float = 0.1
    max_cached: int = 256
    name: str = "suffix"
    _own: Any = field(init=False)  # a tree for each row
    _earlier: Any = field(init=False)  # one tree for the outputs of rows that ended
    _ids: dict[Row, int] = field(default_factory=dict, init=False)
    _matches: dict[Row, list[_Match]] = field(default_factory=dict, init=False)
    _rates: EscapeRates = field(init=False)
    _numbers: count[int] = field(default_factory=count, init=False)

    def __post_init__(self) -> None:
        if self.max_depth < 2:
            raise ValueError(f"max_depth must be at least 2 tokens, got {self.max_depth}")
        if self.max_cached < 0:
            raise ValueError(f"max_cached must be 0 (no earlier outputs) or more, got {self.max_cached}")
        Cache = _library()
        self._own = Cache(self.max_depth, 0)
        self._earlier = Cache(self.max_depth, self.max_cached) if self.max_cached else None
        if self._earlier is not None:
            self._earlier.start_request(_READER, [])
            self._earlier.evict_cached_response(_READER)  # it reads and adds nothing
        self._rates = EscapeRates.prior(_MAX_LENGTH)

    def begin(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._ids[row] = next(self._numbers)
            self._own.start_request(self._ids[row], row.tokens)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        trees = []
        for row, limit in zip(rows, limits, strict=True):
            matches = self._matches[row] = self._find(row, limit) if min(limit.nodes, limit.depth) > 0 else []
            trees.append(self._unite(row.tokens[-1], matches, limit))
        return trees

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        for row in rows:
            new = row.tokens[len(row.tokens) - row.num_new :]
            for match in self._matches.pop(row, ()):
                self._learn(match, new)
            self._own.add_active_response(self._ids[row], new)

    def end(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._matches.pop(row, None)
            number = self._ids.pop(row, None)
            if number is None:
                continue
            self._own.stop_request(number)
            if self._earlier is not None and row.num_emitted:
                self._earlier.start_request(number, [])
                self._earlier.add_active_response(number, row.tokens[row.num_prompt :])
                self._earlier.stop_request(number)

    def _find(self, row: Row, limit: Limit) -> list[_Match]:
        """Matches in both stores, longest first."""
        context = row.tokens[-self.max_depth :]
        matches = self._longest(self._own, self._ids[row], context, limit.nodes)
        if self._earlier is not None:
            matches += self._longest(self._earlier, _READER, context, limit.nodes)
        return sorted(matches, key=lambda match: -match.length)

    def _longest(self, store: Any, number: int, context: list[int], num: int) -> list[_Match]:
        """The longest match in one store, found by bisection, and shorter ones below it."""
        low, high, matches = 0, len(context) - 1, list[_Match]()
        while low < high:
            middle = (low + high + 1) // 2
            draft = _ask(store, number, context, middle, num)
            if draft is None:
                high = middle - 1
            else:
                low, matches = middle, [_Match.of(draft)]
        for length in _SHORTER:
            if length < low and len(matches) < _MAX_MATCHES:
                draft = _ask(store, number, context, length, num)
                matches += [_Match.of(draft)] if draft is not None else []
        return matches

    def _learn(self, match: _Match, new: Sequence[int]) -> None:
        node = -1
        for depth, token in enumerate(new):
            children = match.children.get(node)
            if children is None:
                return
            self._rates.learn(min(match.length + depth, _MAX_LENGTH), token in children)
            if token not in children:
                return
            node = children[token]

    def _unite(self, root: int, matches: Sequence[_Match], limit: Limit) -> TokenTree:
        tokens, parents, depths, estimates = [root], [-1], [0], [1.0]
        places: dict[tuple[int, int], int] = {}
        rates = [0.0, *(self._rates.rate(length) for length in range(1, _MAX_LENGTH + 1))]
        left = 1.0
        for match in matches:
            values, where = {-1: left}, {-1: 0}
            for node, (parent, token) in enumerate(zip(match.parents, match.tokens, strict=True)):
                above = where[parent]
                rate = rates[min(match.length + depths[above], _MAX_LENGTH)]
                values[node] = values[parent] * match.shares[node] * rate
                place = where[node] = places.setdefault((above, token), len(tokens))
                if place == len(tokens):
                    tokens.append(token)
                    parents.append(above)
                    depths.append(depths[above] + 1)
                    estimates.append(0.0)
                estimates[place] += values[node]
            left *= 1 - rates[min(match.length, _MAX_LENGTH)]
        worthy = [i for i in range(1, len(tokens)) if depths[i] <= limit.depth and estimates[i] >= self.min_prob]
        worthy.sort(key=lambda i: (-estimates[i], i))  # a parent is never less probable than its child, nor later
        return self._cut(tokens, parents, estimates, worthy, limit)

    def _cut(
        self, tokens: list[int], parents: list[int], estimates: list[float], nodes: Sequence[int], limit: Limit
    ) -> TokenTree:
        """The tree of the first of ``nodes``, as many as the limit allows."""
        where = {0: 0}
        kept, above, taken = [0], [-1], set[int]()
        for node in nodes:
            parent = where.get(parents[node])
            if parent is None or (limit.chain_only and parent in taken):
                continue
            if len(kept) > limit.nodes:
                break
            taken.add(parent)
            where[node] = len(kept)
            kept.append(node)
            above.append(parent)
        values = tuple(estimates[node] for node in kept)
        if sum(values) - 1 < self.min_gain:
            return TokenTree.root(tokens[0])
        return TokenTree(tuple(tokens[node] for node in kept), tuple(above), estimates=values)


def _ask(store: Any, number: int, context: list[int], length: int, num: int) -> Any | None:
    """What followed the last ``length`` tokens of ``context``, in at most ``num`` nodes; None if nothing did.

    The library takes the best of all matches shorter than the context it is given. A budget that is ``num`` for the
    length asked for, and not above 0 for shorter ones, leaves it no choice.
    """
    draft = store.speculate(
        number,
        context[-(length + 1) :],
        max_spec_tokens=num,
        max_spec_factor=float(num),
        max_spec_offset=-float(num * (length - 1)),
        min_token_prob=0.0,
        use_tree_spec=True,
    )
    return draft if draft.token_ids else None


def _library() -> Any:
    try:
        from arctic_inference.suffix_decoding import SuffixDecodingCache
    except ImportError as error:
        raise ValueError(
            "drafter 'suffix' needs the package arctic-inference: pip install 'specdec-toolkit[suffix]'"
        ) from error
    return SuffixDecodingCache


def build(context: DraftContext) -> Drafter:
    """Options: max_depth, min_prob, min_gain, max_cached."""
    return SuffixDrafter(**context.options)
