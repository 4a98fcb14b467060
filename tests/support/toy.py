"""Tiny models for proofs: a lookup-table target and a lookup-table drafter for each way to draw.

They are real models behind the real protocols, not imitations of our code. Letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from specdec.interfaces import Limit, Row, Scores, Verdict
from specdec.rng import Rng, RowRng, Stream
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree

Tokens = tuple[int, ...]
Shape = tuple["Shape", ...]  # the subtrees below a node, in draw order; () is a leaf

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


def is_path(tree: TokenTree, nodes: Sequence[int]) -> bool:
    """Whether ``nodes`` starts at the root and each next node is a child of the one before."""
    return bool(nodes) and nodes[0] == 0 and all(tree.parents[b] == a for a, b in pairwise(nodes))


class ToyTarget:
    """A Target whose next-token logits depend on the last two tokens, by a table that the seed fixes.

    It checks what a real cache would trip over: unopened rows, a wrong root, a commit of something that is no path.
    """

    def __init__(self, seed: int = 1, vocab: int = 3, *, chain_only: bool = False) -> None:
        self.vocab = self.vocab_size = vocab
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
        assert all(is_path(self._scored[row.key], path) for row, path in zip(rows, paths, strict=True))

    def close(self, rows: Sequence[Row]) -> None:
        self.open_keys -= {row.key for row in rows}


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """What drawn siblings declare: one row of ``draft_probs``."""

    draw: Draw
    probs: Tensor  # (V,)


Child = tuple[int, Origin | None]  # a token, and what it was drawn from; None: picked with certainty
DrawToken = Callable[[Tensor], int]
Pick = Callable[[Sequence[Tensor], int, DrawToken], list[Child]]  # rows (V,) of the tables, how many, how to draw


def top(probs: Tensor, k: int) -> list[int]:
    tokens: list[int] = probs.argsort(descending=True, stable=True)[:k].tolist()
    return tokens


def without(probs: Tensor, tokens: Sequence[int]) -> Tensor:
    left = probs.clone()
    left[list(tokens)] = 0
    return left / left.sum()


def pattern(*draws: Draw | None) -> Pick:
    """Child i comes from table i and is drawn as ``draws[i]`` says, both over and over. None: the best token left."""

    def pick(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
        origins = {(how, i): Origin(how, q) for how in Draw for i, q in enumerate(tables)}
        left = [q.clone() for q in tables]  # of the siblings drawn without replacement
        certain, picks = iter(top(tables[0], len(tables[0]))), list[Child]()
        for i in range(k):
            how, source = draws[i % len(draws)], i % len(tables)
            if how is None:
                picks.append((next(certain), None))
            elif how is Draw.INDEPENDENT:
                picks.append((draw(tables[source]), origins[how, source]))
            elif float(left[source].sum()) > 0:
                picks.append((draw(left[source]), origins[how, source]))
                left[source][picks[-1][0]] = 0
        return picks

    return pick


def pick_top_plus_one(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
    """Greedy multi-draft: first one drawn from q without its best k - 1 tokens, then those."""
    k = min(k, int((tables[0] > 0).sum()))
    best = top(tables[0], k - 1)
    rest = Origin(Draw.INDEPENDENT, without(tables[0], best))
    return [(draw(rest.probs), rest), *((token, None) for token in best)]


def pick_fill_up(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
    """One drawn, then the best tokens beside it: what is certain may depend on elder draws."""
    origin = Origin(Draw.INDEPENDENT, tables[0])
    drawn = draw(tables[0])
    return [(drawn, origin), *((t, None) for t in top(tables[0], len(tables[0])) if t != drawn)][:k]


def pick_by_context(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
    """Some nodes' children are certain and those of others drawn, as q alone decides."""
    return pattern(None if top(tables[0], 1) == [0] else Draw.INDEPENDENT)(tables, k, draw)


def pick_shared(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
    return [(draw(tables[0]), None)]


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to choose children."""

    name: str
    pick: Pick
    num_tables: int = 1
    stream: Stream = Stream.DRAFT


_REPLACED, _GROUP = Draw.INDEPENDENT, Draw.WITHOUT_REPLACEMENT
CERTAIN = Kind("certain", pattern(None))
INDEPENDENT = Kind("independent", pattern(_REPLACED))
TWO_MODELS = Kind("two models", pattern(_REPLACED), num_tables=2)
WITHOUT_REPLACEMENT = Kind("without replacement", pattern(_GROUP))
TWO_GROUPS = Kind("two groups", pattern(_GROUP), num_tables=2)
TOP_PLUS_ONE = Kind("top plus one", pick_top_plus_one)
FILL_UP = Kind("fill up", pick_fill_up)
CERTAIN_FIRST = Kind("certain first", pattern(None, _REPLACED, _REPLACED))
CERTAIN_LAST = Kind("certain last", pattern(_REPLACED, None, None))
GROUP_LAST = Kind("group last", pattern(None, _GROUP, _GROUP))
GROUP_AROUND = Kind("group around certain", pattern(_GROUP, None, _GROUP))
ALL_KINDS = Kind("all kinds", pattern(_GROUP, _REPLACED, None, _GROUP), num_tables=3)
BY_CONTEXT = Kind("certain or drawn by context", pick_by_context)
COUPLED = Kind("coupled", pick_shared, stream=Stream.TARGET)  # chains only: one draw for each position

LEAF: Shape = ()


def chain(depth: int) -> Shape:
    return (chain(depth - 1),) if depth else LEAF


def full(*widths: int) -> Shape:
    """<2, 2> is two children with two children each."""
    return (full(*widths[1:]),) * widths[0] if widths else LEAF


UNBALANCED: Shape = (chain(1), LEAF)  # the child drawn first has a child, the second has none
UNEVEN: Shape = (chain(1), full(2))  # one grandchild below the child drawn first, two below the second


@dataclass(slots=True)
class ToyDrafter:
    """A real drafter over lookup tables: each draw is noise.at(row, position).draw(probs, depth, stream, node).

    Nothing is drafted below a token that the first table gives less than ``min_prob``.
    """

    kind: Kind
    shape: Shape
    vocab: int = 3
    min_prob: float = 0.0
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
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        assert all(row.key in self.begun for row in rows)
        return [
            self._tree(row, limit, rng.at(row.key, len(row.tokens))) for row, limit in zip(rows, limits, strict=True)
        ]

    def _tree(self, row: Row, limit: Limit, rng: RowRng) -> TokenTree:
        tokens, parents, origins = [row.tokens[-1]], [-1], list[Origin | None]([None])
        waiting: list[tuple[int, int, int, Shape]] = [(0, row.tokens[-2], 0, self.shape)]
        while waiting:
            node, before, depth, below = waiting.pop(0)
            num = min(len(below), limit.nodes + 1 - len(tokens))
            if num <= 0 or depth >= limit.depth:
                continue
            here = [each[before * self.vocab + tokens[node]] for each in self.tables]
            indices = iter(range(len(tokens), len(tokens) + num))
            draw = lambda q, depth=depth, indices=indices: rng.draw(q, depth, self.kind.stream, next(indices))  # noqa: E731
            for (token, origin), subtree in zip(self.kind.pick(here, num, draw), below, strict=False):
                is_sure = float(here[0][token]) >= self.min_prob
                waiting.append((len(tokens), tokens[node], depth + 1, subtree if is_sure else LEAF))
                tokens.append(token)
                parents.append(node)
                origins.append(origin)
        return _declared(tokens, parents, origins)

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        pass

    def end(self, rows: Sequence[Row]) -> None:
        self.begun -= {row.key for row in rows}


def _declared(tokens: Sequence[int], parents: Sequence[int], origins: Sequence[Origin | None]) -> TokenTree:
    """The tree in which every drawn node names its origin's row."""
    rows = list(dict.fromkeys(origin for origin in origins if origin is not None))
    if not rows:
        return TokenTree(tuple(tokens), tuple(parents))
    sources = tuple(-1 if origin is None else rows.index(origin) for origin in origins)
    probs = torch.stack([origin.probs for origin in rows])
    return TokenTree(tuple(tokens), tuple(parents), sources, probs, tuple(origin.draw for origin in rows))
