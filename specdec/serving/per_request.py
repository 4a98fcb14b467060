"""The decode loop's parts where each row has settings of its own: distributions, noise, drafts and ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.decode import RowByRow
from specdec.distributions import LogitsTransform, ProcessorTransform
from specdec.grammar.masks import GrammarTransform, RowMask
from specdec.interfaces import Drafter, Limit, Row, Scores, TargetDistributions, Verdict, Verifier
from specdec.rng import PhiloxRng, Rng, RowRng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import TokenTree


class RowFailedError(Exception):
    """What one row asked for failed; the others have nothing to do with it."""

    def __init__(self, row: Row) -> None:
        super().__init__(f"row {row.key} failed")
        self.row = row


@dataclass(slots=True)
class RowSettings:
    """What the loop asks about one row."""

    transform: LogitsTransform
    rng: PhiloxRng
    drafts: bool
    ends: Callable[[Row], bool]  # asked once after each emitted token


@dataclass(slots=True)
class PerRequest:
    """All of it, by the row's key."""

    of: dict[int, RowSettings] = field(default_factory=dict)

    def add(self, row: Row, settings: RowSettings) -> None:
        """Let ``row`` run with ``settings``."""
        self.of[row.key] = settings

    def remove(self, row: Row) -> None:
        """Forget ``row``."""
        del self.of[row.key]

    def stop(self, row: Row) -> bool:
        """Whether ``row`` ends with its newest token."""
        try:
            return self.of[row.key].ends(row)
        except Exception as error:
            raise RowFailedError(row) from error


@dataclass(frozen=True, slots=True)
class RequestTransform:
    """Each row's own distributions."""

    requests: PerRequest

    @property
    def params(self) -> SamplingParams:
        """Nobody's: drafters are asked by ``RequestDrafter``, with each row's own."""
        return GREEDY

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetDistributions:
        return self.requests.of[row.key].transform.target_probs(row, tree, scores)


@dataclass(frozen=True, slots=True)
class RequestRng:
    """Each row's own noise: that of a call of its own, so that a batch changes nothing."""

    requests: PerRequest

    def at(self, row: int, position: int) -> RowRng:
        return self.requests.of[row].rng.at(0, position)


@dataclass(slots=True)
class RequestDrafter(Drafter):
    """Asks ``drafter`` for the rows that want drafts, those that sample alike together."""

    drafter: Drafter
    requests: PerRequest
    _begun: set[Row] = field(default_factory=set, init=False)

    @property
    def name(self) -> str:
        return self.drafter.name

    @property
    def drafts_by_level(self) -> bool:
        return self.drafter.drafts_by_level

    @property
    def model_s(self) -> float:
        return self.drafter.model_s

    @property
    def is_drawing(self) -> bool:
        return self.drafter.is_drawing

    def begin(self, rows: Sequence[Row]) -> None:
        wanted = [row for row in rows if self.requests.of[row.key].drafts]
        self._begun.update(wanted)  # first: what begins half-way has to end, too
        self.drafter.begin(wanted)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        trees = {row: TokenTree.root(row.tokens[-1]) for row in rows}
        alike: dict[SamplingParams, list[tuple[Row, Limit]]] = {}
        for row, limit in zip(rows, limits, strict=True):
            if row in self._begun:
                alike.setdefault(self.requests.of[row.key].transform.params, []).append((row, limit))
        for own, asked in alike.items():
            proposed = self.drafter.propose([row for row, _ in asked], [limit for _, limit in asked], own, rng)
            trees.update(zip((row for row, _ in asked), proposed, strict=True))
        return list(trees.values())

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        begun = [i for i, row in enumerate(rows) if row in self._begun]
        if begun:
            self.drafter.observe(*([each[i] for i in begun] for each in (rows, trees, verdicts, scores)))  # type: ignore[arg-type]

    def end(self, rows: Sequence[Row]) -> None:
        begun = [row for row in rows if row in self._begun]
        self._begun.difference_update(begun)
        self.drafter.end(begun)


@dataclass(frozen=True, slots=True)
class EachForItself:
    """Decides row by row, and says whose processor failed."""

    verifier: Verifier
    rng: Rng

    def __call__(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        scores: Sequence[Scores],
        probs: Sequence[TargetDistributions],
    ) -> list[Verdict]:
        one_row = RowByRow(self.verifier, self.rng)
        verdicts = []
        for row, tree, score, p in zip(rows, trees, scores, probs, strict=True):
            try:
                verdicts += one_row([row], [tree], [score], [p])
            except Exception as error:
                raise RowFailedError(row) from error
        return verdicts


def transform_for(params: SamplingParams, processors: Sequence[Any]) -> LogitsTransform:
    """From logits to distributions as in generate(): ``processors``, the mask of the row's grammar if it has one, and
    then temperature, top-k, top-p and min-p.
    """
    if not processors:
        return GrammarTransform(params)
    warpers: list[Any] = []
    if not params.is_greedy:
        if params.temperature != 1:
            warpers.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            warpers.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            warpers.append(MinPLogitsWarper(params.min_p))
    return ProcessorTransform([*processors, RowMask(), *warpers], params)
