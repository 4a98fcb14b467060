"""How a draft model's tree grows: which children a node gets, which nodes get children, and what is proposed.

Knows nothing of models: it is handed the draft distribution of each node that it asked for. Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from specdec.interfaces import Limit, Row
from specdec.noise import RowNoise, Stream
from specdec.sampling import SamplingParams, sampling_probs
from specdec.tree import Draw, TokenTree


class Children(StrEnum):
    """How the children of a node are chosen from the draft distribution q."""

    CERTAIN = "certain"  # the most probable ones
    COUPLED = "coupled"  # the best ones under the noise that the verifier will use (drafter-invariant coupling)
    INDEPENDENT = "independent"  # k draws with replacement (SpecInfer)
    WITHOUT_REPLACEMENT = "without_replacement"  # k draws, each from what is left (Sequoia, RSD)
    TOP_PLUS_ONE = "top_plus_one"  # one draw from q without its top k - 1, and those (greedy multi-draft)


@dataclass(frozen=True, slots=True)
class Shape:
    """Which nodes get how many children.

    Static: ``widths[i]`` children for every node of level i (SpecInfer's expansion). Best-first (``widths`` empty):
    ``top_k`` children for the ``top_k`` most probable nodes of each of ``depth`` levels, of which the most probable
    are proposed (EAGLE-2). A chain is the static shape of ones.
    """

    widths: tuple[int, ...] = ()
    top_k: int = 4
    depth: int = 5
    min_confidence: float = 0.0  # a node whose path is less probable under the draft model gets no children

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.widths) or self.top_k < 1 or self.depth < 1:
            raise ValueError(f"a shape needs at least one child and one level, got {self}")

    @property
    def num_levels(self) -> int:
        return len(self.widths) or self.depth

    def num_children(self, level: int) -> int:
        return self.widths[level] if self.widths else self.top_k

    @classmethod
    def parse(cls, text: str, top_k: int, depth: int, min_confidence: float) -> Shape:
        """ "chain" (``depth`` long), "best-first", or static widths such as "3x2x1".

        Raises:
            ValueError: another form.
        """
        if text == "chain":
            return cls((1,) * depth, top_k, depth, min_confidence)
        if text == "best-first":
            return cls((), top_k, depth, min_confidence)
        try:
            return cls(tuple(int(width) for width in text.split("x")), top_k, depth, min_confidence)
        except ValueError:
            raise ValueError(f"shape must be chain, best-first or widths such as 3x2x1, got {text!r}") from None


@dataclass(slots=True)
class Growing:
    """One row's tree as it grows. Nodes that were scored are asked for in ``scored``'s order."""

    row: Row
    limit: Limit
    shape: Shape
    children: Children
    params: SamplingParams
    noise: RowNoise
    draw_offset: int = 0  # where this drafter's random numbers start among those of its row and step
    tokens: list[int] = field(init=False)
    parents: list[int] = field(default_factory=lambda: [-1])
    confidence: list[float] = field(default_factory=lambda: [1.0])  # probability of the path under the draft model
    depths: list[int] = field(default_factory=lambda: [0])
    sources: list[int] = field(default_factory=lambda: [-1])
    draft_probs: list[Tensor] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # nodes that the draft model has seen, in its order
    frontier: list[int] = field(default_factory=lambda: [0])  # nodes that it sees next
    level: int = 0

    def __post_init__(self) -> None:
        self.tokens = [self.row.tokens[-1]]
        if self.limit.depth < 1 or self.limit.nodes < 1:
            self.frontier = []

    @property
    def engine_tree(self) -> TokenTree:
        """The scored nodes and the frontier behind them."""
        order = self.scored + self.frontier
        place = {node: i for i, node in enumerate(order)}
        parents = tuple(place.get(self.parents[node], -1) for node in order)
        return TokenTree(tuple(self.tokens[node] for node in order), parents)

    def expand(self, logits: Tensor) -> None:
        """Give the frontier children from its draft ``logits`` (len(frontier), V), and choose the next frontier."""
        grown: list[int] = []
        for node, each in zip(self.frontier, logits, strict=True):
            grown += self._add_children(node, each)
        self.scored += self.frontier
        self.level += 1
        if self.level >= min(self.shape.num_levels, self.limit.depth):
            grown = []
        # What has no chance of a place in the tree need not be scored either.
        grown = [node for node in self._unrepeated(grown) if self.confidence[node] >= self.shape.min_confidence]
        grown.sort(key=lambda node: -self.confidence[node])
        if not self.shape.widths:
            grown = grown[: self.shape.top_k]
        if not self._may_drop:
            # Drawn children are all proposed, so a node is expanded only while there is room for them.
            room = self.limit.nodes - (len(self.tokens) - 1)
            grown = grown[: max(room, 0)]
        self.frontier = sorted(grown)

    @property
    def _may_drop(self) -> bool:
        """Only nodes picked with certainty may be left out for being improbable."""
        return self.children in (Children.CERTAIN, Children.COUPLED) or self.params.is_greedy

    def _unrepeated(self, nodes: Sequence[int]) -> list[int]:
        seen: set[tuple[int, int]] = set()
        fresh = []
        for node in nodes:
            key = (self.parents[node], self.tokens[node])
            if key not in seen:
                seen.add(key)
                fresh.append(node)
        return fresh

    def _add_children(self, node: int, logits: Tensor) -> list[int]:
        count = 1 if self.limit.chain_only else self.shape.num_children(self.depths[node])
        if not self._may_drop:
            count = min(count, self.limit.nodes - (len(self.tokens) - 1))
        if count < 1:
            return []
        depth = self.depths[node]
        if self._may_drop:
            probs = self._ranking(logits, depth)
            best = probs.topk(min(count, len(probs)))
            pairs = [(t, p) for t, p in zip(best.indices.tolist(), best.values.tolist(), strict=True) if p > 0]
            return [self._add(node, token, prob, -1) for token, prob in pairs]
        return self._draw_children(node, sampling_probs(logits, self.params), count, depth)

    def _ranking(self, logits: Tensor, depth: int) -> Tensor:
        """How likely each token (V,) is the target's; with coupling softmax(log q + the verifier's own noise)."""
        if self.params.is_greedy:
            return logits.float().softmax(-1)
        probs = sampling_probs(logits, self.params)
        if self.children is Children.CERTAIN:
            return probs
        support = probs.nonzero().squeeze(-1)
        scores = probs[support].double().log() + self.noise.gumbel(support, depth)
        return torch.zeros(len(probs), dtype=scores.dtype, device=probs.device).scatter_(0, support, scores.softmax(-1))

    def _draw_children(self, node: int, probs: Tensor, count: int, depth: int) -> list[int]:
        index = self.draw_offset + len(self.tokens)
        source = len(self.draft_probs)
        if self.children is Children.TOP_PLUS_ONE and count > 1:
            top = probs.topk(min(count - 1, int((probs > 0).sum()))).indices.tolist()
            rest = probs.clone()
            rest[top] = 0
            certain = [(token, float(probs[token])) for token in top]
            if float(rest.sum()) <= 0:
                return [self._add(node, token, prob, -1) for token, prob in certain]
            self._remember(rest / rest.sum(), Draw.INDEPENDENT)
            drawn = self.noise.draw(rest, depth, Stream.DRAFT, index)
            first = self._add(node, drawn, float(probs[drawn]), source)
            return [first, *(self._add(node, token, prob, -1) for token, prob in certain)]
        if self.children is Children.WITHOUT_REPLACEMENT and count > 1:
            self._remember(probs, Draw.WITHOUT_REPLACEMENT)
            tokens = self.noise.race(probs, count, depth, index)
        else:
            self._remember(probs, Draw.INDEPENDENT)
            tokens = [self.noise.draw(probs, depth, Stream.DRAFT, index + i) for i in range(count)]
        return [self._add(node, token, float(probs[token]), source) for token in tokens]

    def _remember(self, probs: Tensor, draw: Draw) -> None:
        self.draft_probs.append(probs)
        self.draws.append(draw)

    def _add(self, parent: int, token: int, prob: float, source: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.confidence.append(self.confidence[parent] * prob)
        self.depths.append(self.depths[parent] + 1)
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
