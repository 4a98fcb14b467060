"""How a draft model's tree grows: which children a node gets, which nodes get children, and what is proposed.

Knows nothing of models: it is handed the draft distribution of each node that it asked for. Letters: k nodes of one
level, V the target's vocabulary, Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from specdec.drafters.trees.expansion import ChildSampling, Shape
from specdec.drafters.trees.ranking import DraftVocab, ranking
from specdec.drafters.trees.shapes import Path as RankPath
from specdec.interfaces import Limit, Row, Scores
from specdec.rng import RowRng, Stream
from specdec.sampling import SamplingParams, sampling_probs
from specdec.tree import Draw, TokenTree


@dataclass(slots=True)
class TreeBuilder:
    """One row's tree as it grows. Nodes that were scored are asked for in ``scored``'s order."""

    row: Row
    limit: Limit
    shape: Shape
    children: ChildSampling
    params: SamplingParams
    rng: RowRng
    vocab: DraftVocab | None = None  # None: the draft's logits are over the target's vocabulary
    tokens: list[int] = field(init=False)
    parents: list[int] = field(default_factory=lambda: [-1])
    confidence: list[float] = field(default_factory=lambda: [1.0])  # probability of the path under the draft model
    paths: list[RankPath] = field(default_factory=lambda: [()])
    sources: list[int] = field(default_factory=lambda: [-1])
    draft_probs: list[Tensor] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # nodes that the draft model has seen, in its order
    frontier: list[int] = field(default_factory=lambda: [0])  # nodes that it sees next
    level: int = 0

    def __post_init__(self) -> None:
        self.tokens = [self.row.tokens[-1]]
        if self.limit.num_levels < 1 or self.limit.nodes < 1:
            self.frontier = []

    @property
    def engine_tree(self) -> TokenTree:
        """The scored nodes and the frontier behind them."""
        order = self.scored + self.frontier
        place = {node: i for i, node in enumerate(order)}
        parents = tuple(place.get(self.parents[node], -1) for node in order)
        return TokenTree(tuple(self.tokens[node] for node in order), parents)

    def expand(self, logits: Tensor) -> None:
        """Give the frontier children from its draft ``logits`` (len(frontier), Vd), and choose the next frontier."""
        logits = self._masked(logits)
        grown = self._pick_children(logits) if self._may_drop else self._draw_level(logits)
        self.scored += self.frontier
        self.level += 1
        if self.level >= min(self.shape.num_levels, self.limit.num_levels):
            grown = []
        # What has no chance of a place in the tree need not be scored either.
        grown = [
            node
            for node in self._unrepeated(grown)
            if self.confidence[node] >= self.shape.min_confidence and self._num_children(node) > 0
        ]
        grown.sort(key=lambda node: -self.confidence[node])
        if self.shape.is_best_first:
            grown = grown[: self.shape.top_k]
        if not self._may_drop:
            # Drawn children are all proposed, so a node is expanded only while there is room for them.
            room = self.limit.nodes - (len(self.tokens) - 1)
            grown = grown[: max(room, 0)]
        self.frontier = sorted(grown)

    def _masked(self, logits: Tensor) -> Tensor:
        """``logits`` without what the row's grammar excludes: then they are what the target's will look like."""
        grammar = self.row.grammar
        if grammar is None or self.vocab is not None:
            return logits
        rows = []
        for node, each in zip(self.frontier, logits, strict=True):
            state = grammar.find(self.row.tokens, self._path_tokens(node))
            kept = each if state is None else each.masked_fill(~state.allowed().to(each.device), -torch.inf)
            rows.append(kept if bool(kept.isfinite().any()) else each)  # the draft model may know none of those
        return torch.stack(rows)

    def _path_tokens(self, node: int) -> list[int]:
        tokens = []
        while node:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    @property
    def _may_drop(self) -> bool:
        """Only nodes picked with certainty may be left out for being improbable."""
        return not self.children.is_drawn or self.params.is_greedy

    def _unrepeated(self, nodes: Sequence[int]) -> list[int]:
        seen: set[tuple[int, int]] = set()
        fresh = []
        for node in nodes:
            key = (self.parents[node], self.tokens[node])
            if key not in seen:
                seen.add(key)
                fresh.append(node)
        return fresh

    def _num_children(self, node: int) -> int:
        count = self.shape.num_children(self.paths[node])
        return min(count, 1) if self.limit.chain_only else count

    def _pick_children(self, logits: Tensor) -> list[int]:
        rng = self.rng if self.children is ChildSampling.COUPLED else None
        probs = ranking(logits, self.params, rng, self.level, self.vocab)
        counts = [self._num_children(node) for node in self.frontier]
        best = probs.topk(min(max(counts), probs.shape[-1]))
        tokens = best.indices if self.vocab is None else self.vocab.ids.take(best.indices)
        grown = []
        for node, count, *children in zip(self.frontier, counts, tokens.tolist(), best.values.tolist(), strict=True):
            pairs = islice(zip(*children, strict=True), count)
            grown += [self._add(node, token, prob, -1, i) for i, (token, prob) in enumerate(pairs) if prob > 0]
        return grown

    def _draw_level(self, logits: Tensor) -> list[int]:
        grown = []
        for node, node_logits in zip(self.frontier, logits, strict=True):
            count = min(self._num_children(node), self.limit.nodes - (len(self.tokens) - 1))
            if count > 0:
                probs = sampling_probs(node_logits, self.params)
                probs = probs if self.vocab is None else self.vocab.spread(probs)
                grown += self._draw_children(node, probs, count, self.level)
        return grown

    def _draw_children(self, node: int, probs: Tensor, count: int, depth: int) -> list[int]:
        index = len(self.tokens)
        source = len(self.draft_probs)
        if self.children is ChildSampling.TOP_PLUS_ONE and count > 1:
            top = probs.topk(min(count - 1, int((probs > 0).sum()))).indices.tolist()
            rest = probs.clone()
            rest[top] = 0
            certain = [(token, float(probs[token])) for token in top]
            if float(rest.sum()) <= 0:
                return [self._add(node, token, prob, -1, i) for i, (token, prob) in enumerate(certain)]
            self._remember(rest / rest.sum(), Draw.INDEPENDENT)
            drawn = self.rng.draw(rest, depth, Stream.DRAFT, index)
            first = self._add(node, drawn, float(probs[drawn]), source, 0)
            return [first, *(self._add(node, token, prob, -1, i) for i, (token, prob) in enumerate(certain, 1))]
        if self.children is ChildSampling.WITHOUT_REPLACEMENT and count > 1:
            self._remember(probs, Draw.WITHOUT_REPLACEMENT)
            tokens = self.rng.sample_without_replacement(probs, count, depth, index)
        else:
            self._remember(probs, Draw.INDEPENDENT)
            tokens = [self.rng.draw(probs, depth, Stream.DRAFT, index + i) for i in range(count)]
        return [self._add(node, token, float(probs[token]), source, i) for i, token in enumerate(tokens)]

    def _remember(self, probs: Tensor, draw: Draw) -> None:
        self.draft_probs.append(probs)
        self.draws.append(draw)

    def _add(self, parent: int, token: int, prob: float, source: int, rank: int) -> int:
        self.tokens.append(token)
        self.paths.append((*self.paths[parent], rank))
        self.parents.append(parent)
        self.confidence.append(self.confidence[parent] * prob)
        self.sources.append(source)
        return len(self.tokens) - 1

    def proposal(self) -> TokenTree:
        """What is verified: everything that was drawn; of what was picked, the most probable within the limit."""
        if not self._may_drop:
            nodes = list(range(len(self.tokens)))
        else:
            # A child is never more probable than its parent, so the best ones form a tree.
            ranked = sorted(range(1, len(self.tokens)), key=lambda node: (-self.confidence[node], node))
            nodes = [0, *sorted(ranked[: self.limit.nodes])]
        place = {node: i for i, node in enumerate(nodes)}
        tokens = tuple(self.tokens[node] for node in nodes)
        parents = tuple(place.get(self.parents[node], -1) for node in nodes)
        estimates = tuple(self.confidence[node] for node in nodes)
        if not self.draft_probs:
            return TokenTree(tokens, parents, estimates=estimates)
        sources = tuple(self.sources)
        return TokenTree(tokens, parents, sources, torch.stack(self.draft_probs), tuple(self.draws), estimates)

    def scored_path(self, tokens: Sequence[int]) -> list[int]:
        """Places in ``scored`` of the nodes along ``tokens`` from the root, as far as the draft model has seen them."""
        path: list[int] = []
        node = 0
        place = {node: i for i, node in enumerate(self.scored)}
        if 0 not in place:
            return path
        path.append(place[0])
        for token in tokens:
            below = (n for n in self.scored if self.parents[n] == node and self.tokens[n] == token)
            node = next(below, -1)
            if node < 0:
                break
            path.append(place[node])
        return path


class DraftEngine(Protocol):
    """What a tree can be grown with: a model that keeps what it has scored of a tree until the next step."""

    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree], num_scored: Sequence[int]) -> list[Scores]:
        """Draft logits of the nodes behind the first ``num_scored`` ones of each tree, in one pass."""


def grow(engine: DraftEngine, builders: Sequence[TreeBuilder], vocab_size: int | None = None) -> None:
    """Grow trees to their end: one pass of ``engine`` for each level of all of them.

    ``vocab_size`` is the target's, where the engine's logits differ from it by padding.
    """
    while active := [tree for tree in builders if tree.frontier]:
        scores = engine.score(
            [tree.row for tree in active], [tree.engine_tree for tree in active], [len(t.scored) for t in active]
        )
        for tree, score in zip(active, scores, strict=True):
            tree.expand(score.logits if vocab_size is None else fitted(score.logits, vocab_size))


def fitted(logits: Tensor, vocab_size: int) -> Tensor:
    """``logits`` (k, V') cut or filled with -inf to (k, ``vocab_size``)."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab_size]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
