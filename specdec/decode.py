"""The decode loop: propose, score, verify, commit, observe, yield. Knows no concrete drafter, verifier or model.

Plain decoding is this loop with trees of one node, so baseline and method run the same code. Randomness and the clock
are arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

from specdec.budget.adaptive import Budget, FixedBudget
from specdec.distributions import LogitsTransform
from specdec.interfaces import Drafter, Limit, Row, Scores, Step, Target, TargetDistributions, Verdict, Verifier
from specdec.release import call_all
from specdec.rng import Rng
from specdec.settings import DEFAULTS
from specdec.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Emission:
    """One row's share of one pass: the step, and what is needed to look behind it."""

    step: Step
    row: Row
    tree: TokenTree
    probs: TargetDistributions
    scores: Scores


class Decide(Protocol):
    """Decides on all rows of a pass."""

    def __call__(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        scores: Sequence[Scores],
        probs: Sequence[TargetDistributions],
    ) -> list[Verdict]: ...


@dataclass(frozen=True, slots=True)
class RowByRow:
    """Asks the verifier about one row after another, on the host."""

    verifier: Verifier
    rng: Rng

    def __call__(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        scores: Sequence[Scores],
        probs: Sequence[TargetDistributions],
    ) -> list[Verdict]:
        return [
            self.verifier.verify(tree, p, self.rng.at(row.key, len(row.tokens)))
            for row, tree, p in zip(rows, trees, probs, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Decoder:
    """Everything that decides how rows are generated."""

    target: Target
    drafter: Drafter
    verifier: Verifier
    logits_transform: LogitsTransform
    rng: Rng
    stop: Callable[[Row], bool]  # asked after each emitted token
    budget: Budget = field(default_factory=lambda: FixedBudget(DEFAULTS.max_nodes))
    clock: Callable[[], float] = time.perf_counter
    decide: Decide | None = None  # None: RowByRow

    def run(self, rows: Iterable[Row], max_rows: int | None = None) -> Generator[Emission, None, None]:
        """Generate every row to its end, at most ``max_rows`` at a time; rows join as others finish.

        Yields each row's share of each pass; tokens are appended to ``row.tokens``. A row ends at its ``max_tokens``
        or where ``stop`` says so, and tokens accepted beyond that are dropped. Leaving early frees all rows, and so
        does any error, of which the first is raised.
        """
        waiting, active = iter(rows), list[Row]()
        try:
            while True:
                joining = list(islice(waiting, None if max_rows is None else max_rows - len(active)))
                if joining:
                    self.join(joining)
                    active += joining
                if not active:
                    return
                emissions = self.step(active)
                done = [e.row for e in emissions if e.step.finished]
                if done:
                    active = [e.row for e in emissions if not e.step.finished]
                    self.leave(done)
                yield from emissions
                del emissions  # they hold what the pass computed, whose room the next pass may need
        except GeneratorExit:  # the caller has seen enough
            self.leave(active)
            raise
        except BaseException as error:
            self.leave(active, during=error)
            raise

    def step(self, rows: Sequence[Row]) -> list[Emission]:
        """One pass for all rows: each emits at least one token."""
        started = self.clock()
        limits = self.budget.limits(rows, self.target.chain_only or self.verifier.chain_only)
        proposed = self.drafter.propose(rows, limits, self.logits_transform.params, self.rng)
        _check_trees(rows, proposed, limits, self.target.vocab_size, self.drafter.name)
        trees = self.budget.cut(rows, proposed)
        drafted = self.clock()
        scores = self.target.score(rows, trees)
        scored = self.clock()
        probs = [self.logits_transform.target_probs(*each) for each in zip(rows, trees, scores, strict=True)]
        decide = self.decide or RowByRow(self.verifier, self.rng)
        verdicts = decide(rows, trees, scores, probs)
        self.target.commit(rows, [verdict.nodes for verdict in verdicts])
        finished = [self._emit(row, verdict) for row, verdict in zip(rows, verdicts, strict=True)]
        verified = self.clock()
        self.drafter.observe(rows, trees, verdicts, scores)
        observed = self.clock()
        # A device may still be at work when ``score`` returns: only the verdict waits for it.
        self.budget.learn(rows, trees, verdicts, drafted - started + observed - verified, verified - drafted)
        seconds = (drafted - started + self.clock() - verified, scored - drafted, verified - scored)
        shares = [s / len(rows) for s in seconds]
        return [
            Emission(_record(row, tree, verdict, len(rows), shares, done), row, tree, p, score)
            for row, tree, verdict, done, p, score in zip(rows, trees, verdicts, finished, probs, scores, strict=True)
        ]

    def _emit(self, row: Row, verdict: Verdict) -> bool:
        """Append the verdict's tokens to the row up to where it ends; whether it does."""
        row.num_steps += 1
        row.num_new = 0
        for token in verdict.tokens:
            row.tokens.append(token)
            row.num_new += 1
            if row.num_left <= 0 or self.stop(row):
                return True
        return False

    def join(self, rows: Sequence[Row]) -> None:
        """Let ``rows`` take part in the steps to come. If that fails they have left again, and the error is raised."""
        try:
            self.target.open(rows)
            self.drafter.begin(rows)
        except BaseException as error:
            self.leave(rows, during=error)  # what was opened half-way has to be released, too
            raise

    def leave(self, rows: Sequence[Row], during: BaseException | None = None) -> None:
        """Free what ``rows`` hold; with ``during``, an error that the caller will raise, further ones become its notes."""
        call_all((partial(self.drafter.end, rows), partial(self.target.close, rows)), during)


def _check_trees(
    rows: Sequence[Row], trees: Sequence[TokenTree], limits: Sequence[Limit], vocab_size: int, name: str
) -> None:
    if len(trees) != len(rows):
        raise ValueError(f"drafter {name!r} must propose one tree for each of {len(rows)} rows, got {len(trees)}")
    for row, tree, limit in zip(rows, trees, limits, strict=True):
        if tree.tokens[0] != row.tokens[-1]:
            raise ValueError(f"drafter {name!r} must root its tree at the row's newest token, got {tree.tokens[0]}")
        if len(tree) - 1 > limit.nodes or (len(tree) > 1 and max(tree.depths()) > limit.depth):
            raise ValueError(f"drafter {name!r} must keep within {limit}, got parents {tree.parents}")
        if min(tree.tokens) < 0 or max(tree.tokens) >= vocab_size:
            wrong = next(token for token in tree.tokens if not 0 <= token < vocab_size)
            raise ValueError(
                f"drafter {name!r} must propose token ids of the target's vocabulary, 0 to {vocab_size - 1}, got {wrong}"
            )


def _record(
    row: Row, tree: TokenTree, verdict: Verdict, num_rows: int, seconds: Sequence[float], finished: bool
) -> Step:
    """What the row really emitted: tokens behind its end do not count as accepted."""
    n = row.num_new
    return Step(
        row=row.key,
        index=row.num_steps - 1,
        position=len(row.tokens) - n,
        tokens=verdict.tokens[:n],
        nodes=verdict.nodes[:n],
        tree_tokens=tree.tokens,
        tree_parents=tree.parents,
        num_rows=num_rows,
        draft_s=seconds[0],
        score_s=seconds[1],
        verify_s=seconds[2],
        finished=finished,
    )
