"""Tiny models for proofs: a lookup-table target and a lookup-table drafter for each way to draw.

They are real models behind the real protocols, not imitations of our code. Letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.interfaces import Limit, Row, Scores, Verdict
from specdec.noise import Noise, RowNoise, Stream
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree

Tokens = tuple[int, ...]
Shape = tuple["Shape", ...]  # the subtrees below a node, in draw order; () is a leaf
Pick = Callable[[Sequence[Tensor], int, Callable[[Tensor], int]], list[tuple[int, int]]]

PROMPT: Tokens = (0, 1)


def table(seed: int, vocab: int, spread: float, holes: int) -> Tensor:
    """Logits (V * V, V) by the last two tokens: float64, one token excluded in every ``holes``-th context (0: never)."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(vocab * vocab, vocab, dtype=torch.float64, generator=generator)
    if holes:
        for context in range(seed % holes, vocab * vocab, holes):
            logits[context, (context + seed) % vocab] = -math.inf
    return logits


def context(tokens: Sequence[int], vocab: int) -> int:
    return tokens[-2] * vocab + tokens[-1]


class ToyTarget:
    """A Target whose next-token logits depend on the last two tokens, by a table that the seed fixes.

    It checks what a real cache would trip over: unopened rows, a wrong root, a commit of something that is no path.
    """

    def __init__(self, seed: int = 1, vocab: int = 3, *, chain_only: bool = False) -> None:
        self.vocab = vocab
        self.logits = table(seed, vocab, spread=1.5, holes=3)
        self.chain_only = chain_only
        self.open_keys: set[int] = set()
        self._scored: dict[int, TokenTree] = {}

    def open(self, rows: Sequence[Row]) -> None:
        self.open_keys |= {row.key for row in rows}

    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[Scores]:
        assert all(row.key in self.open_keys for row in rows)
        self._scored = {row.key: tree for row, tree in zip(rows, trees, strict=True)}
        return [Scores(self.logits[self._contexts(row, tree)]) for row, tree in zip(rows, trees, strict=True)]

    def _contexts(self, row: Row, tree: TokenTree) -> list[int]:
        assert tree.tokens[0] == row.tokens[-1]
        before = [row.tokens[-2], *(tree.tokens[parent] for parent in tree.parents[1:])]
        return [a * self.vocab + b for a, b in zip(before, tree.tokens, strict=True)]

    def commit(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> None:
        assert all(self._scored[row.key].is_path(path) for row, path in zip(rows, paths, strict=True))

    def close(self, rows: Sequence[Row]) -> None:
        self.open_keys -= {row.key for row in rows}


def pick_top(draft_probs: Sequence[Tensor], k: int, draw: Callable[[Tensor], int]) -> list[tuple[int, int]]:
    return [(int(token), 0) for token in draft_probs[0].argsort(descending=True, stable=True)[:k]]


def pick_independent(draft_probs: Sequence[Tensor], k: int, draw: Callable[[Tensor], int]) -> list[tuple[int, int]]:
    """Sibling i comes from table i (modulo their number), as from several draft models."""
    return [(draw(draft_probs[i % len(draft_probs)]), i % len(draft_probs)) for i in range(k)]


def pick_without_replacement(
    draft_probs: Sequence[Tensor], k: int, draw: Callable[[Tensor], int]
) -> list[tuple[int, int]]:
    left, picks = draft_probs[0].clone(), list[tuple[int, int]]()
    while len(picks) < k and float(left.sum()) > 0:
        picks.append((draw(left), 0))
        left[picks[-1][0]] = 0
    return picks


def pick_top_plus_one(draft_probs: Sequence[Tensor], k: int, draw: Callable[[Tensor], int]) -> list[tuple[int, int]]:
    """The last child is always the drawn one: no more children than tokens that can be drawn."""
    k = min(k, int((draft_probs[0] > 0).sum()))
    top = pick_top(draft_probs, k - 1, draw)
    rest = draft_probs[0].clone()
    rest[[token for token, _ in top]] = 0
    return [*top, (draw(rest), 0)]


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to choose children, and what it declares."""

    draw: Draw
    pick: Pick
    num_tables: int = 1
    stream: Stream = Stream.DRAFT


CERTAIN = Kind(Draw.CERTAIN, pick_top)
INDEPENDENT = Kind(Draw.INDEPENDENT, pick_independent)
TWO_MODELS = Kind(Draw.INDEPENDENT, pick_independent, num_tables=2)
WITHOUT_REPLACEMENT = Kind(Draw.WITHOUT_REPLACEMENT, pick_without_replacement)
TOP_PLUS_ONE = Kind(Draw.TOP_PLUS_ONE, pick_top_plus_one)
COUPLED = Kind(Draw.CERTAIN, pick_independent, stream=Stream.TARGET)  # chains only: one draw for each position

LEAF: Shape = ()


def chain(depth: int) -> Shape:
    return (chain(depth - 1),) if depth else LEAF


def full(*widths: int) -> Shape:
    """<2, 2> is two children with two children each."""
    return (full(*widths[1:]),) * widths[0] if widths else LEAF


UNBALANCED: Shape = (chain(1), LEAF)  # the child drawn first has a child, the second has none


@dataclass(slots=True)
class ToyDrafter:
    """A real drafter over lookup tables: each draw is noise.at(row, position).draw(probs, depth, stream, node)."""

    kind: Kind
    shape: Shape
    vocab: int = 3
    seed: int = 11
    name: str = "toy"
    begun: set[int] = field(default_factory=set)
    tables: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        seeds = range(self.seed, self.seed + self.kind.num_tables)
        self.tables = [table(seed, self.vocab, spread=1.0, holes=4).softmax(-1) for seed in seeds]

    def begin(self, rows: Sequence[Row]) -> None:
        self.begun |= {row.key for row in rows}

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, noise: Noise
    ) -> list[TokenTree]:
        assert all(row.key in self.begun for row in rows)
        return [
            self._tree(row, limit, noise.at(row.key, len(row.tokens))) for row, limit in zip(rows, limits, strict=True)
        ]

    def _tree(self, row: Row, limit: Limit, noise: RowNoise) -> TokenTree:
        tokens, parents, sources = [row.tokens[-1]], [-1], [-1]
        probs = list[Tensor]()
        waiting: list[tuple[int, int, int, Shape]] = [(0, row.tokens[-2], 0, self.shape)]
        while waiting:
            node, before, depth, below = waiting.pop(0)
            if not below or depth >= limit.depth:
                continue
            here = [each[before * self.vocab + tokens[node]] for each in self.tables]
            indices = iter(range(len(tokens), len(tokens) + len(below)))
            draw = lambda q, depth=depth, indices=indices: noise.draw(q, depth, self.kind.stream, next(indices))  # noqa: E731
            picks = self.kind.pick(here, len(below), draw)
            for (token, source), subtree in zip(picks, below, strict=False):
                waiting.append((len(tokens), tokens[node], depth + 1, subtree))
                tokens.append(token)
                parents.append(node)
                sources.append(len(probs) + source)
            probs += here
        if self.kind.draw is Draw.CERTAIN or len(tokens) == 1:
            return TokenTree(tuple(tokens), tuple(parents))
        return TokenTree(tuple(tokens), tuple(parents), self.kind.draw, torch.stack(probs), tuple(sources))

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], scores: Sequence[Scores]) -> None:
        pass

    def end(self, rows: Sequence[Row]) -> None:
        self.begun -= {row.key for row in rows}
