"""Processors and criteria that must be asked as generate() asks them: about the whole batch, once for each column.

A grammar matcher advances at each call, a bias may stand for each row, a criterion may look at all rows and answer for
all: nothing is known of what a caller brings. So all rows are decided on together, column by column: processors are
shown (B, t) ids and (B, V) scores, every row picks its token, criteria are shown (B, t + 1) ids. A pass ends for all
rows at the first column whose next one its trees do not hold for every row. These are generate()'s own calls, in its
order, so whatever an object does is right; rows accept as many tokens as the one that accepts least.

Verifiers are pure: one is run anew each time its row knows one more column, and what it drew and asked before is kept.

Letters: B rows, t columns of ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.distributions import GrowingIds, LogitsTransform, NodeDistributions, in_float32, processed
from specdec.errors import UnsupportedOptionError
from specdec.interfaces import Row, Scores, Target, TargetDistributions, Verdict, Verifier
from specdec.rng import Rng, RowRng, Stream
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree


class _Waiting(Exception):  # noqa: N818, it is no error
    """A walk arrived at a node whose column is not processed yet."""

    def __init__(self, node: int, scores: Tensor) -> None:
        self.node = node
        self.scores = scores  # (V,)


@dataclass(slots=True)
class _Tape:
    """The noise of one step, remembered: a walk that is run anew asks the same questions in the same order."""

    rng: RowRng
    _answers: list[Any] = field(default_factory=list)
    _place: int = 0

    def rewind(self) -> None:
        self._place = 0

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        return int(self._next(lambda: self.rng.draw(probs, depth, stream, index)))

    def gumbel(self, tokens: Tensor, depth: int) -> Tensor:
        return self._next(lambda: self.rng.gumbel(tokens, depth))  # type: ignore[no-any-return]

    def sample_without_replacement(self, probs: Tensor, count: int, depth: int, index: int = 0) -> list[int]:
        return list(self._next(lambda: self.rng.sample_without_replacement(probs, count, depth, index)))

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        return bool(self._next(lambda: self.rng.bernoulli(prob, depth, index)))

    def _next(self, ask: Any) -> Any:
        if self._place == len(self._answers):
            self._answers.append(ask())
        self._place += 1
        return self._answers[self._place - 1]


@dataclass(slots=True)
class _Walk:
    """One row's way down its tree."""

    row: Row
    tree: TokenTree
    probs: TargetDistributions
    rng: _Tape
    tokens: Sequence[int] = ()  # picked so far
    nodes: Sequence[int] = ()  # that they were picked at
    waiting: _Waiting | None = None
    is_complete: bool = False

    def advance(self, verifier: Verifier, num_columns: int) -> None:
        """Go on until ``num_columns`` tokens are picked, or a column is waited for."""
        while len(self.tokens) < num_columns and self.waiting is None:
            assert not self.is_complete
            self.rng.rewind()
            try:
                verdict = verifier.verify(self.tree, self.probs, self.rng)
            except _Waiting as waiting:
                path = self.tree.path(waiting.node)
                self.waiting = waiting
                self.nodes, self.tokens = path[:-1], [self.tree.tokens[node] for node in path[1:]]
            else:
                self.nodes, self.tokens, self.is_complete = verdict.nodes, verdict.tokens, True

    def verdict(self, num_columns: int) -> Verdict:
        return Verdict(tuple(self.nodes[:num_columns]), tuple(self.tokens[:num_columns]))


@dataclass(slots=True)
class LockstepPolicy:
    """Processors, verifier and criteria take turns as in generate(), over all rows of one batch.

    The keys of rows are their places in the batch. If ``by_node`` is given it processes scores, at any node, and only
    criteria are asked column by column.
    """

    input_ids: Tensor  # (B, L) with padding
    processors: Sequence[Any]
    criteria: Sequence[Any]
    params: SamplingParams
    pad: int | None  # what follows in rows that have ended; None: they go on until all have ended
    keeps_scores: bool = False  # criteria are shown the processed scores of all columns
    by_node: LogitsTransform | None = None
    model: Any = None  # the one that generates: processors that run it are refused
    absent: list[tuple[Row, TokenTree, Scores]] = field(default_factory=list)  # of rows that have ended
    _ids: GrowingIds = field(init=False)
    _shown: Tensor = field(init=False)  # (B, t)
    _unfinished: Tensor = field(init=False)  # (B,)
    _scores: list[Tensor] = field(default_factory=list)  # (B, V) for each new column
    _columns: list[Tensor] = field(default_factory=list)  # (B, V) of this pass
    _walks: dict[int, _Walk] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ids = GrowingIds(self.input_ids)
        self._shown = self._ids.shown()
        self._unfinished = torch.ones(len(self.input_ids), dtype=torch.bool, device=self.input_ids.device)

    @property
    def needs_absent(self) -> bool:
        """Whether rows that have ended are to be scored on, because somebody may look at their scores."""
        return self.pad is not None and (self.by_node is None or self.keeps_scores)

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetDistributions:
        if self.by_node is not None:
            return self.by_node.target_probs(row, tree, scores)
        return NodeDistributions(self.params, row, tree, scores.logits, partial(self._column_of, row, tree))

    def _column_of(self, row: Row, tree: TokenTree, node: int, scores: Tensor) -> Tensor:
        path = tree.path_tokens(node)
        if len(path) >= len(self._columns):
            raise _Waiting(node, scores)
        assert path == list(self._walks[row.key].tokens[: len(path)]), "a verifier that looks ahead"
        return self._columns[len(path)][row.key]

    def verdicts(
        self,
        verifier: Verifier,
        rng: Rng,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        probs: Sequence[TargetDistributions],
    ) -> list[Verdict]:
        tapes = [_Tape(rng.at(row.key, len(row.tokens))) for row in rows]
        walks = [_Walk(*each) for each in zip(rows, trees, probs, tapes, strict=True)]
        self._walks, self._columns = {walk.row.key: walk for walk in walks}, []
        num_columns = 0
        while True:
            num_columns += 1
            for walk in walks:
                walk.advance(verifier, num_columns)
            if any(len(walk.tokens) < num_columns for walk in walks):
                self._open_column(walks)
                for walk in walks:
                    walk.advance(verifier, num_columns)
            is_end = self._close_column(walks, num_columns - 1)
            if is_end or any(walk.is_complete and len(walk.tokens) == num_columns for walk in walks):
                return [walk.verdict(num_columns) for walk in walks]

    def stop(self, row: Row) -> bool:
        """Whether the row ends with its newest token, which its latest verdict said."""
        if row.num_emitted < self._ids.length - self.input_ids.shape[1]:
            return False
        return not bool(self._unfinished.any() if self.pad is None else self._unfinished[row.key])

    def _open_column(self, walks: Sequence[_Walk]) -> None:
        """Process the scores of the next token of every row."""
        raw = {row.key: in_float32(scores.logits[len(self._columns)]) for row, _, scores in self.absent}
        for walk in walks:
            assert walk.waiting is not None
            raw[walk.row.key] = walk.waiting.scores
            walk.waiting = None
        scores = torch.stack([raw[row] for row in range(len(raw))])
        for processor in self.processors:
            with _no_passes(self.model, processor):
                scores = processed(processor, self._shown, scores)
        self._columns.append(scores.clone())  # a processor may hand out the same tensor again

    def _close_column(self, walks: Sequence[_Walk], depth: int) -> bool:
        """Append the token that every row picked and ask the criteria; whether the pass ends here."""
        if self.keeps_scores:
            self._scores.append(self._processed(walks, depth))
        tokens = [self.pad or 0] * len(self.input_ids)
        for walk in walks:
            tokens[walk.row.key] = walk.tokens[depth]
        self._ids.extend(self._ids.column(tokens))
        self._shown = self._ids.shown()
        before = self._unfinished
        self._unfinished = before & ~self._is_done()
        if self.pad is None:
            return not bool(self._unfinished.any())
        return not torch.equal(self._unfinished, before)

    def _processed(self, walks: Sequence[_Walk], depth: int) -> Tensor:
        """(B, V) the processed scores that the tokens at ``depth`` were picked by."""
        if self.by_node is None:
            return self._columns[depth]
        rows = {walk.row.key: _scores_at(walk.probs, walk.nodes[depth]) for walk in walks}
        for row, tree, scores in self.absent:
            rows[row.key] = _scores_at(self.by_node.target_probs(row, tree, scores), depth)
        return torch.stack([rows[row] for row in range(len(rows))])

    def _is_done(self) -> Tensor:
        """(B,) what the criteria say of the rows, joined as in StoppingCriteriaList."""
        done = torch.zeros_like(self._unfinished)
        scores = tuple(self._scores) if self.keeps_scores else None
        for criterion in self.criteria:
            joined = done | criterion(self._shown, scores)
            if joined.numel() != done.numel():
                raise UnsupportedOptionError(
                    f"a stopping criterion must answer with one bool or {len(done)}, one for each row; "
                    f"{type(criterion).__name__} answered with the shape {tuple(joined.shape)}"
                )
            done = joined.reshape(done.shape)
        return done


def _scores_at(probs: TargetDistributions, node: int) -> Tensor:
    assert isinstance(probs, NodeDistributions)
    return probs.scores(node)


@contextmanager
def _no_passes(model: Any, processor: Any) -> Iterator[None]:
    """Refuse a ``processor`` that holds ``model`` if it runs it."""
    if model is None or not any(part is model for part in getattr(processor, "__dict__", {}).values()):
        yield
        return

    def refuse(*_: Any) -> None:
        raise UnsupportedOptionError(
            f"{type(processor).__name__} runs the model for every token, so nothing is left that speculation could "
            "save; leave out the option that adds it, or call model.generate"
        )

    hook = model.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True, slots=True)
class LockstepVerdicts:
    """Decides on all rows of a pass together, under a :class:`LockstepPolicy`."""

    logits_transform: LockstepPolicy
    verifier: Verifier
    rng: Rng

    def __call__(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        scores: Sequence[Scores],
        probs: Sequence[TargetDistributions],
    ) -> list[Verdict]:
        return self.logits_transform.verdicts(self.verifier, self.rng, rows, trees, probs)


@dataclass(slots=True)
class LockstepTarget:
    """A target that goes on scoring rows that have ended, over padding, until all rows of the batch have.

    As in generate(): a processor or a criterion may look at their scores.
    """

    target: Target
    logits_transform: LockstepPolicy
    _open: list[Row] = field(default_factory=list)
    _ended: list[Row] = field(default_factory=list)

    @property
    def vocab_size(self) -> int:
        return self.target.vocab_size

    @property
    def chain_only(self) -> bool:
        return self.target.chain_only

    def open(self, rows: Sequence[Row]) -> None:
        self.target.open(rows)
        self._open += rows

    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[Scores]:
        depth = max(max(tree.depths()) for tree in trees)
        padding = [self.logits_transform.pad or 0] * depth
        chains = [TokenTree.chain(row.tokens[-1], padding) for row in self._ended]
        scores = self.target.score([*rows, *self._ended], [*trees, *chains])
        self.logits_transform.absent = list(zip(self._ended, chains, scores[len(rows) :], strict=True))
        return scores[: len(rows)]

    def commit(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> None:
        num_columns = len(paths[0])
        self.target.commit([*rows, *self._ended], [*paths, *[range(num_columns)] * len(self._ended)])
        for row in self._ended:
            row.tokens += [self.logits_transform.pad or 0] * num_columns

    def close(self, rows: Sequence[Row]) -> None:
        self._ended += [row for row in rows if row in self._open]
        self._open = [row for row in self._open if row not in rows]
        if not self._open:
            self.target.close(self._ended)
            self._ended = []
