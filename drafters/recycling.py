"""Token Recycling (Luo et al., 2024): the target's own runner-up tokens, kept as the drafts of later steps.

Every pass scores more nodes than it keeps. The top successors at each of them are remembered under the last 1 to
``max_order`` tokens, also those of rejected nodes; later trees are grown best-first from what is remembered. Departures
from the paper: longer contexts beside single tokens, prompts as a source (their logits are never computed), how likely
the target thought each successor, and a tree that follows acceptance rates learned as rows go for each such class, not
a fixed template. One table serves all rows.

Letters for shapes: k successors, n nodes of one tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specdec.drafters.heads.shipped import SHIPPED, kept, shipped_fault, version
from specdec.drafters.lookup.class_rates import ClassRates
from specdec.drafters.lookup.start_table import StartTable
from specdec.drafters.lookup.successors import Context, SuccessorTable, keys_of
from specdec.drafters.lookup.table_file import load_table, save_table
from specdec.drafters.lookup.top_tokens import top_successors
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Target, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree

_SHIPPED = "smollm2-135m-recycling"

Rates = list[list[float]]  # for each length of context and class


@dataclass(slots=True)
class RecyclingDrafter(Drafter):
    """Drafts from what the target itself thought likely in the same context before; no model, no training.

    Every node is picked with certainty. What a table made ahead knows of a context counts beside what was seen in this
    text; of a token that both know, the higher rate.

    Args:
        vocab_size: token ids of the target.
        max_order: the longest context, in tokens; 1 is the paper's adjacency matrix.
        num_successors: how many are remembered for each context.
        capacity: how many contexts of each length are remembered.
        min_prob: a node whose estimated probability of being accepted is lower is not worth its place.
        min_gain: expected accepted tokens below which the step is not worth a larger pass at all.
        path: file that the table is loaded from, if it exists, and saved to when the last row ends.
        start: what the target expects after many contexts, gathered ahead (the paper's hot start).

    Raises:
        ValueError: a value out of its range, or a file that does not hold such a table.
    """

    vocab_size: int
    max_order: int = 3
    num_successors: int = 8
    capacity: int = 65536
    min_prob: float = 0.01
    min_gain: float = 0.1
    path: str | Path | None = None
    start: StartTable | None = None
    name: str = "recycling"
    table: SuccessorTable = field(init=False)
    rates: ClassRates = field(init=False)
    start_rates: ClassRates = field(init=False)
    _reach: int = field(init=False)  # tokens of the longest context of either table
    _rows: set[Row] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        for option in ("max_order", "num_successors", "capacity"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, option)}")
        if self.num_successors > self.vocab_size:
            raise ValueError(
                f"num_successors must be at most the vocabulary's {self.vocab_size}, got {self.num_successors}"
            )
        self.table = SuccessorTable(self.max_order, self.num_successors, self.capacity)
        self.rates = ClassRates.prior(self.max_order)
        order = self.start.max_order if self.start else 0
        self.start_rates = ClassRates.averages(order)
        self._reach = max(self.max_order, order)
        if self.path is not None:
            self.path = Path(self.path).expanduser()
            if not self.path.parent.is_dir():
                raise ValueError(f"path must lie in a folder that exists, got {self.path}")
            if self.path.exists():
                self.rates = load_table(self.path, self.table, self.vocab_size)

    def begin(self, rows: Sequence[Row]) -> None:
        self._rows.update(rows)
        for row in rows:
            self.table.read_text(row.tokens)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        rates = self.rates.values(), self.start_rates.values()
        return [
            self._grow(self._context(row, len(row.tokens)), limit, *rates)
            for row, limit in zip(rows, limits, strict=True)
        ]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        for row in rows:
            for end in range(len(row.tokens) - row.num_new, len(row.tokens)):
                keys = keys_of(self._context(row, end))
                self.rates.learn(self.table.find(keys), row.tokens[end])
                if self.start:
                    self.start_rates.learn(self.start.find(keys), row.tokens[end])
        successors, classes = top_successors(scores, self.num_successors)
        contexts: list[Context] = []
        places: list[int] = []  # accepted nodes come last: where contexts are equal, they count
        for row, tree, verdict in zip(rows, trees, verdicts, strict=True):
            first = len(contexts)
            contexts += self._contexts(self._context(row, len(row.tokens) - row.num_new), tree)
            accepted = set(verdict.nodes)
            places += [first + node for node in range(len(tree)) if node not in accepted]
            places += [first + node for node in verdict.nodes]
        usable = [place for place in places if successors[place, 0] >= 0]
        ids = np.array(contexts, np.int64)[usable]
        self.table.write_parts(ids, successors[usable], classes[usable])

    def end(self, rows: Sequence[Row]) -> None:
        begun = self._rows.intersection(rows)
        self._rows -= begun
        if begun and not self._rows and self.path is not None:
            self.save()

    def save(self) -> None:
        """Write the table to ``path``, all of it or nothing.

        Raises:
            ValueError: there is no path.
            OSError: the file cannot be written.
        """
        if self.path is None:
            raise ValueError("the table has no file: pass path=...")
        save_table(Path(self.path), self.table, self.rates, self.vocab_size)

    def _context(self, row: Row, end: int) -> Context:
        """The last tokens of the row before position ``end``."""
        context = tuple(row.tokens[max(0, end - self._reach) : end])
        return (-1,) * (self._reach - len(context)) + context

    def _contexts(self, root: Context, tree: TokenTree) -> list[Context]:
        """(n,) the context that each node ends; ``root`` is that of the root."""
        contexts = [root]
        for parent, token in zip(tree.parents[1:], tree.tokens[1:], strict=True):
            contexts.append((*contexts[parent][1:], token))
        return contexts

    def _successors(self, context: Context, rates: Rates, start_rates: Rates) -> dict[int, float]:
        """The known successors of ``context`` and how likely each is to be accepted."""
        keys = keys_of(context)
        order, tokens, classes = self.table.find(keys)
        likely = {token: rates[order][kind] for token, kind in zip(tokens, classes, strict=True)}
        if self.start:
            order, tokens, classes = self.start.find(keys)
            for token, kind in zip(tokens, classes, strict=True):
                likely[token] = max(likely.get(token, 0.0), start_rates[order][kind])
        return likely

    def _grow(self, context: Context, limit: Limit, rates: Rates, start_rates: Rates) -> TokenTree:
        """Best-first: always add the most probable candidate, then offer its own successors."""
        tokens, parents, depths, estimates = [context[-1]], [-1], [0], [1.0]
        contexts = [context]
        taken: set[int] = set()
        heap: list[tuple[float, int, int]] = []  # (-probability, parent, token)

        def offer(node: int) -> None:
            if depths[node] < limit.depth:
                for token, rate in self._successors(contexts[node], rates, start_rates).items():
                    estimate = estimates[node] * rate
                    if estimate >= self.min_prob:
                        heapq.heappush(heap, (-estimate, node, token))

        offer(0)
        while heap and len(tokens) <= limit.nodes:
            negative, parent, token = heapq.heappop(heap)
            if limit.chain_only and parent in taken:
                continue
            taken.add(parent)
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            estimates.append(-negative)
            contexts.append((*contexts[parent][1:], token))
            offer(len(tokens) - 1)
        if sum(estimates) - 1 < self.min_gain:
            return TokenTree.root(tokens[0])
        return TokenTree(tuple(tokens), tuple(parents), estimates=tuple(estimates))


def build(context: DraftContext) -> Drafter:
    """Options: max_order, num_successors, capacity, min_prob, min_gain, path, start (auto, a folder, or None)."""
    return _build(context, **context.options)


def _build(context: DraftContext, start: Any = "auto", **options: Any) -> Drafter:
    return RecyclingDrafter(context.target.vocab_size, start=_start(context.target, start), **options)


def _start(target: Target, start: Any) -> StartTable | None:
    """The table in the folder ``start``; with "auto" the shipped one, if it was made for this target."""
    if start == "auto":
        folder = SHIPPED / _SHIPPED
        fits = folder.is_dir() and isinstance(target, CausalLM) and not shipped_fault(folder, target)
        start = folder if fits else None
    if start is None:
        return None
    folder = Path(str(start)).expanduser()
    if not isinstance(target, CausalLM):
        return StartTable.load(folder, target.vocab_size)
    return kept(target, ("recycling", *version(folder)), lambda: StartTable.load(folder, target.vocab_size))
