"""Token Recycling (Luo et al., 2024): the target's own runner-up tokens, kept as the drafts of later steps.

Every pass scores more nodes than it keeps. The top successors at each of them are remembered under the last 1 to
``max_order`` tokens, also those of rejected nodes; later trees are grown best-first from what is remembered. Departures
from the paper: longer contexts beside single tokens, prompts as a source (their logits are never computed), how likely
the target thought each successor, and a tree that follows acceptance rates learned as rows go for each such class, not
a fixed template. One table serves all rows.

Letters for shapes: c contexts, o tokens of a context, k successors, n nodes of one tree, V vocabulary.
"""

from __future__ import annotations

import heapq
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.noise import Noise
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree

Context = tuple[int, ...]  # the newest token last; -1 where the text has not begun

_FORMAT = 2  # raise it when the file's layout, the classes or the hash changes
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1

# Classes of successors: by the target's probability at the time, or by rank where only the text is known.
_BOUNDS = np.array([0.98, 0.9, 0.7, 0.5, 0.3, 0.15, 0.07, 0.03], np.float32)  # between the classes 0 to 8
_TYPICAL = (0.99, 0.94, 0.8, 0.6, 0.4, 0.22, 0.1, 0.05, 0.01)
_TEXT_RATES = (0.5, 0.22, 0.1)  # of the latest follower, of the one before, of those before that
_FIRST_TEXT = len(_TYPICAL)
_NUM_CLASSES = _FIRST_TEXT + len(_TEXT_RATES)


@dataclass(slots=True)
class SuccessorTable:
    """The latest successors of contexts of 1 to ``max_order`` tokens, in memory that never grows.

    A context is known by a 64-bit hash and has one slot among those of its length, which it takes from whatever stood
    there: old contexts fade out. A collision of hashes would cost acceptance, never exactness.
    """

    max_order: int
    num_successors: int
    capacity: int  # contexts of each length
    keys: NDArray[np.uint64] = field(init=False)  # (max_order, capacity)  0: empty
    successors: NDArray[np.int32] = field(init=False)  # (max_order, capacity, k)  best first, -1: none
    classes: NDArray[np.uint8] = field(init=False)  # (max_order, capacity, k)

    def __post_init__(self) -> None:
        self.keys = np.zeros((self.max_order, self.capacity), np.uint64)
        self.successors = np.full((self.max_order, self.capacity, self.num_successors), -1, np.int32)
        self.classes = np.zeros((self.max_order, self.capacity, self.num_successors), np.uint8)

    def lookup(self, context: Context) -> tuple[int, list[int], list[int]]:
        """Of the longest known part of ``context``: how long it is (0: none), its successors and their classes."""
        found: tuple[int, int] | None = None
        key = 0
        for order, token in enumerate(reversed(context), 1):
            key = (key ^ (token + 1)) * _MULTIPLIER & _MASK
            slot = (key >> 32) * self.capacity >> 32
            if self.keys[order - 1, slot] == key:
                found = order, slot
        if found is None:
            return 0, [], []
        order, slot = found
        tokens = [token for token in self.successors[order - 1, slot].tolist() if token >= 0]
        return order, tokens, self.classes[order - 1, slot, : len(tokens)].tolist()

    def write(self, contexts: NDArray[np.int64], successors: NDArray[np.int32], classes: NDArray[np.uint8]) -> None:
        """Remember ``successors`` and their ``classes`` (c, k) of ``contexts`` (c, o); of equal ones the last counts."""
        keys = np.zeros(len(contexts), np.uint64)
        for column in range(contexts.shape[1] - 1, -1, -1):
            keys = (keys ^ (contexts[:, column] + 1).astype(np.uint64)) * np.uint64(_MULTIPLIER)
        slots = (keys >> np.uint64(32)) * np.uint64(self.capacity) >> np.uint64(32)
        order = contexts.shape[1]
        self.keys[order - 1, slots] = keys
        self.successors[order - 1, slots] = successors
        self.classes[order - 1, slots] = classes

    def read_text(self, tokens: Sequence[int]) -> None:
        """Remember what followed what in ``tokens``, the latest first, before what was known."""
        for order in range(1, self.max_order + 1):
            after: dict[Context, dict[int, None]] = {}
            for i in range(order, len(tokens)):
                known = after.setdefault(tuple(tokens[i - order : i]), {})
                known.pop(tokens[i], None)
                known[tokens[i]] = None  # a dictionary keeps its order: the latest is last
            if after:
                rows = [self._joined(context, list(known)[::-1]) for context, known in after.items()]
                tokens_of, classes = np.array([row[0] for row in rows], np.int32), [row[1] for row in rows]
                self.write(np.array(list(after), np.int64), tokens_of, np.array(classes, np.uint8))

    def _joined(self, context: Context, tokens: list[int]) -> tuple[list[int], list[int]]:
        """``tokens``, then what was known of ``context``, with their classes, filled up to ``num_successors``."""
        joined = {token: _FIRST_TEXT + min(i, len(_TEXT_RATES) - 1) for i, token in enumerate(tokens)}
        order, known, classes = self.lookup(context)
        if order == len(context):
            for token, kind in zip(known, classes, strict=True):
                joined.setdefault(token, kind)
        missing = self.num_successors - len(joined)
        return (
            [*joined, *[-1] * missing][: self.num_successors],
            [*joined.values(), *[0] * missing][: self.num_successors],
        )


@dataclass(slots=True)
class ClassRates:
    """How often a successor of each class was the token that came, for each length of context."""

    hits: NDArray[np.float64]  # (max_order + 1, classes)
    trials: NDArray[np.float64]  # (max_order + 1, classes)

    @classmethod
    def prior(cls, max_order: int) -> ClassRates:
        """Worth ten observations: a short context says less than the text that it was seen in."""
        known = np.array([1 - 0.6 ** (order + 1) for order in range(max_order + 1)])[:, None]
        rates = np.concatenate([known * _TYPICAL, np.tile(_TEXT_RATES, (max_order + 1, 1))], 1)
        trials = np.full(rates.shape, 10.0)
        return cls(trials * rates, trials)

    def learn(self, order: int, tokens: Sequence[int], classes: Sequence[int], token: int) -> None:
        """``token`` came where ``tokens`` of ``classes`` were the known successors of a context of ``order`` tokens."""
        for known, kind in zip(tokens, classes, strict=True):
            self.trials[order, kind] += 1
            self.hits[order, kind] += known == token
            if self.trials[order, kind] > 400:  # what is long past counts less
                self.trials[order, kind] /= 2
                self.hits[order, kind] /= 2

    def values(self) -> list[list[float]]:
        """(max_order + 1, classes) acceptance rates."""
        return (self.hits / self.trials).tolist()  # type: ignore[no-any-return]


@dataclass(slots=True)
class RecyclingDrafter:
    """Drafts from what the target itself thought likely in the same context before; no model, no training.

    Every node is picked with certainty.

    Args:
        vocab_size: token ids of the target.
        max_order: the longest context, in tokens; 1 is the paper's adjacency matrix.
        num_successors: how many are remembered for each context.
        capacity: how many contexts of each length are remembered.
        min_prob: a node whose estimated probability of being accepted is lower is not worth its place.
        min_gain: expected accepted tokens below which the step is not worth a larger pass at all.
        path: file that the table is loaded from, if it exists, and saved to when the last row ends.

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
    name: str = "recycling"
    table: SuccessorTable = field(init=False)
    rates: ClassRates = field(init=False)
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
        if self.path is not None:
            self.path = Path(self.path).expanduser()
            if not self.path.parent.is_dir():
                raise ValueError(f"path must lie in a folder that exists, got {self.path}")
            if self.path.exists():
                _load(self, self.path)

    def begin(self, rows: Sequence[Row]) -> None:
        self._rows.update(rows)
        for row in rows:
            self.table.read_text(row.tokens)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, noise: Noise
    ) -> list[TokenTree]:
        rates = self.rates.values()
        return [
            self._grow(self._context(row, len(row.tokens)), limit, rates)
            for row, limit in zip(rows, limits, strict=True)
        ]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        for row in rows:
            for end in range(len(row.tokens) - row.num_new, len(row.tokens)):
                order, known, classes_known = self.table.lookup(self._context(row, end))
                if order:
                    self.rates.learn(order, known, classes_known, row.tokens[end])
        successors, classes = _top(scores, self.num_successors)
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
        for order in range(1, self.max_order + 1):
            self.table.write(ids[:, -order:], successors[usable], classes[usable])

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
        _save(self, Path(self.path))

    def _context(self, row: Row, end: int) -> Context:
        """The last tokens of the row before position ``end``."""
        context = tuple(row.tokens[max(0, end - self.max_order) : end])
        return (-1,) * (self.max_order - len(context)) + context

    def _contexts(self, root: Context, tree: TokenTree) -> list[Context]:
        """(n,) the context that each node ends; ``root`` is that of the root."""
        contexts = [root]
        for parent, token in zip(tree.parents[1:], tree.tokens[1:], strict=True):
            contexts.append((*contexts[parent][1:], token))
        return contexts

    def _grow(self, context: Context, limit: Limit, rates: list[list[float]]) -> TokenTree:
        """Best-first: always add the most probable candidate, then offer its own successors."""
        tokens, parents, depths, estimates = [context[-1]], [-1], [0], [1.0]
        contexts = [context]
        taken: set[int] = set()
        heap: list[tuple[float, int, int]] = []  # (-probability, parent, token)

        def offer(node: int) -> None:
            if depths[node] < limit.depth:
                order, known, classes = self.table.lookup(contexts[node])
                for token, kind in zip(known, classes, strict=True):
                    estimate = estimates[node] * rates[order][kind]
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


def _top(scores: Sequence[Scores], num: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """The best successors of all nodes of all rows (sum of n, k) and their classes, on the host.

    -1 stands where the logits rule a token out.
    """
    logits = [score.logits for score in scores]
    if logits[0].is_cuda:  # one launch for all rows; on the host a copy of all logits would cost more than it saves
        logits = [torch.cat(logits)]
    best = [each.topk(num) for each in logits]
    values = torch.cat([each.values for each in best]).float()
    sums = torch.cat([each.float().logsumexp(-1, keepdim=True) for each in logits])
    found: Tensor = torch.cat([each.indices for each in best]).masked_fill(~values.isfinite(), -1)
    bounds = torch.from_numpy(_BOUNDS).flip(0).to(values.device)
    classes = len(_BOUNDS) - torch.bucketize((values - sums).exp(), bounds)
    return found.to("cpu", torch.int32).numpy(), classes.to("cpu", torch.uint8).numpy()


def _facts(drafter: RecyclingDrafter) -> dict[str, int]:
    """What a file must agree with."""
    return {
        "format": _FORMAT,
        "vocab_size": drafter.vocab_size,
        "max_order": drafter.max_order,
        "num_successors": drafter.num_successors,
        "capacity": drafter.capacity,
    }


def _save(drafter: RecyclingDrafter, path: Path) -> None:
    table, rates = drafter.table, drafter.rates
    orders, slots = table.keys.nonzero()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            np.savez(
                file,
                facts=np.array(list(_facts(drafter).values()), np.int64),
                slots=np.stack([orders, slots]),
                keys=table.keys[orders, slots],
                successors=table.successors[orders, slots],
                classes=table.classes[orders, slots],
                rates=np.stack([rates.hits, rates.trials]),
            )
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _load(drafter: RecyclingDrafter, path: Path) -> None:
    advice = f"delete {path}, or name another path"
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            data: dict[str, NDArray[Any]] = dict(file)
        facts = dict(zip(_facts(drafter), data["facts"].tolist(), strict=True))
        wrong = [f"{key}={facts[key]}" for key, value in _facts(drafter).items() if facts[key] != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole table of drafter 'recycling' ({error}); {advice}") from error
    if wrong:
        ours = ", ".join(f"{key}={value}" for key, value in _facts(drafter).items())
        raise ValueError(f"{path} holds a table with {', '.join(wrong)}, and this one has {ours}; {advice}")
    try:
        orders, slots = data["slots"]
        found = np.asarray(data["successors"], np.int32)
        if found.min(initial=0) < -1 or found.max(initial=0) >= drafter.vocab_size:
            raise ValueError("token ids outside the vocabulary")
        if min(orders.min(initial=0), slots.min(initial=0)) < 0:
            raise ValueError("slots outside the table")
        classes = np.asarray(data["classes"], np.uint8)
        if classes.max(initial=0) >= _NUM_CLASSES:
            raise ValueError("unknown classes")
        hits, trials = data["rates"].reshape(2, *drafter.rates.hits.shape)
        if not ((hits >= 0).all() and (trials > 0).all() and (hits <= trials).all() and np.isfinite(trials).all()):
            raise ValueError("rates that are none")
        drafter.table.keys[orders, slots] = data["keys"]
        drafter.table.successors[orders, slots] = found
        drafter.table.classes[orders, slots] = classes
        drafter.rates = ClassRates(hits, trials)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a whole table of drafter 'recycling' ({error}); {advice}") from error


def build(context: DraftContext) -> Drafter:
    """Options: max_order, num_successors, capacity, min_prob, min_gain, path."""
    target: Any = context.target
    return RecyclingDrafter(target.vocab_size, **context.options)
