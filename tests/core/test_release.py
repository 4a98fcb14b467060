"""Rows are released whatever raises: by the loop, by a hybrid for its parts, and by an engine half-way through a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from onerow import make_model
from toy import ToyTarget

from specdec.budget.adaptive import FixedBudget
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import Drafter, Limit, Row, Scores, Target, Verdict
from specdec.rng import PhiloxRng, Rng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import make_verifier


@dataclass(slots=True, eq=False)
class Failing(Drafter):
    """A drafter that drafts nothing and raises where it is told to, after half of the rows."""

    fails_in: tuple[str, ...] = ()
    name: str = "failing"
    begun: set[Row] = field(default_factory=set)

    def begin(self, rows: Sequence[Row]) -> None:
        for i, row in enumerate(rows):
            self._fail("begin", i > 0)
            self.begun.add(row)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        self._fail("propose")
        return [TokenTree.root(row.tokens[-1]) for row in rows]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        self._fail("observe")

    def end(self, rows: Sequence[Row]) -> None:
        self.begun.difference_update(rows)
        self._fail("end")

    def _fail(self, where: str, now: bool = True) -> None:
        if now and where in self.fails_in:
            raise RuntimeError(f"{self.name} failed in {where}")


class FailingTarget(ToyTarget):
    """A target that raises in one method, in ``open`` after the first row."""

    def __init__(self, fails_in: str) -> None:
        super().__init__()
        self.fails_in = fails_in

    def open(self, rows: Sequence[Row]) -> None:
        super().open(rows[:1])
        if self.fails_in == "open":
            raise RuntimeError("target failed in open")
        super().open(rows)

    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[Scores]:
        if self.fails_in == "score":
            raise RuntimeError("target failed in score")
        return super().score(rows, trees)

    def commit(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> None:
        if self.fails_in == "commit":
            raise RuntimeError("target failed in commit")
        super().commit(rows, paths)

    def close(self, rows: Sequence[Row]) -> None:
        super().close(rows)
        if self.fails_in == "close":
            raise RuntimeError("target failed in close")


def decoder(target: Target, drafter: Drafter) -> Decoder:
    logits_transform, rule = WarperTransform(GREEDY), make_verifier("match")
    return Decoder(target, drafter, rule, logits_transform, PhiloxRng(0), lambda row: False, FixedBudget(4))


def rows(*lengths: int) -> list[Row]:
    return [Row(key, [key % 3, 1], 2 + length) for key, length in enumerate(lengths)]


@pytest.mark.parametrize("where", ["begin", "propose", "observe", "end"])
def test_the_target_is_freed_whatever_a_drafter_raises(where: str) -> None:
    """Guards cache lines that stay taken because ``end`` raised first, or because ``begin`` did behind ``open``."""
    target, drafter = ToyTarget(), Failing((where,))
    with pytest.raises(RuntimeError, match=f"failing failed in {where}"):
        list(decoder(target, drafter).run(rows(1, 3, 2), max_rows=2))
    assert target.open_keys == set()
    assert drafter.begun == set()


@pytest.mark.parametrize("where", ["open", "score", "commit", "close"])
def test_the_drafter_is_told_whatever_the_target_raises(where: str) -> None:
    """Guards rows that ``open`` left half-way: they are closed, although it raised."""
    target, drafter = FailingTarget(where), Failing()
    with pytest.raises(RuntimeError, match=f"target failed in {where}"):
        list(decoder(target, drafter).run(rows(1, 3)))
    assert target.open_keys == set()
    assert drafter.begun == set()


def test_the_first_error_is_the_one_that_is_seen() -> None:
    """Guards tracebacks that name the clean-up instead of the fault; what the clean-up raised is a note."""
    target, drafter = FailingTarget("close"), Failing(("propose", "end"))
    with pytest.raises(RuntimeError, match="failing failed in propose") as caught:
        list(decoder(target, drafter).run(rows(3)))
    notes = "\n".join(caught.value.__notes__)
    assert "failing failed in end" in notes
    assert "target failed in close" in notes
    with pytest.raises(RuntimeError, match="failing failed in end") as caught:
        list(decoder(target, Failing(("end",))).run(rows(1)))
    assert "target failed in close" in "\n".join(caught.value.__notes__)


def test_leaving_early_shows_an_error_of_the_clean_up() -> None:
    target = ToyTarget()
    run = decoder(target, Failing(("end",))).run(rows(3, 3))
    next(run)
    with pytest.raises(RuntimeError, match="failing failed in end"):
        run.close()
    assert target.open_keys == set()


@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("where", ["begin", "propose", "observe", "end"])
def test_every_part_of_a_hybrid_is_told_that_rows_end(where: str, broken: int) -> None:
    """Guards parts behind the one that raised, in hybrids within hybrids too."""
    parts = [Failing((where,) if i == broken else (), f"part {i}") for i in range(3)]
    hybrid = HybridDrafter([parts[0], HybridDrafter(parts[1:])])
    target = ToyTarget()
    with pytest.raises(RuntimeError, match=f"part {broken} failed in {where}"):
        list(decoder(target, hybrid).run(rows(2, 3)))
    assert target.open_keys == set()
    assert [part.begun for part in parts] == [set()] * 3


def test_an_engine_frees_rows_that_no_pass_has_seen() -> None:
    """Guards moving a line that is reserved but not yet there: a row joined, and the drafter raised before the pass."""
    engine = CausalLM(make_model())
    first, second = Row(0, [5, 9, 12], 20), Row(1, [7, 8], 20)
    loop = decoder(engine, NoDrafter())
    engine.open([first])
    loop.step([first])
    engine.open([second])
    engine.close([first, second])
    engine.close([first, second])  # rows that are not open are ignored
    again = Row(2, [5, 9, 12], 20)
    list(loop.run([again]))
    assert again.num_emitted == 17
