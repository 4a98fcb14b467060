"""The decode loop: rows that come and go, limits, what it records, and that it always cleans up."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

import pytest
from toy import CERTAIN, INDEPENDENT, TWO_MODELS, UNBALANCED, Kind, ToyDrafter, ToyTarget, chain, full

from specdec.budget.adaptive import FixedBudget
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters.none import NoDrafter
from specdec.engine.passes import PASS_COLUMNS, grouped
from specdec.interfaces import Drafter, Limit, Row, Scores, Step, TargetDistributions, Verdict
from specdec.rng import PhiloxRng, Rng, RowRng
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree
from specdec.verifiers.match import MatchVerifier
from specdec.verifiers.rejection import RejectionVerifier


def make(drafter: Drafter, target: ToyTarget | None = None, stop: int | None = None) -> Decoder:
    return Decoder(
        target=target or ToyTarget(),
        drafter=drafter,
        verifier=RejectionVerifier(),
        logits_transform=WarperTransform(SamplingParams()),
        rng=PhiloxRng(3),
        stop=lambda row: row.tokens[-1] == stop,
        budget=FixedBudget(6),
    )


def make_rows(*lengths: int) -> list[Row]:
    return [Row(key, [key % 3, 1], 2 + length) for key, length in enumerate(lengths)]


@dataclass(slots=True)
class Journal:
    """A drafter that proposes nothing and writes down what it is told."""

    name: str = "journal"
    events: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    fail_at: int = 10**9  # the pass that raises

    def begin(self, rows: Sequence[Row]) -> None:
        self.events.append(("begin", tuple(row.key for row in rows)))

    def propose(
        self,
        rows: Sequence[Row],
        limits: Sequence[Limit],
        params: SamplingParams,
        rng: Rng,
    ) -> list[TokenTree]:
        self.events.append(("propose", tuple(row.key for row in rows)))
        self.limits += limits
        if sum(name == "propose" for name, _ in self.events) > self.fail_at:
            raise RuntimeError("the draft model broke")
        return [TokenTree.root(row.tokens[-1]) for row in rows]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        assert len(rows) == len(verdicts) == len(scores)
        for row, verdict in zip(rows, verdicts, strict=True):
            assert tuple(row.tokens[-row.num_new :]) == verdict.tokens[: row.num_new]
        self.events.append(("observe", tuple(row.key for row in rows)))

    def end(self, rows: Sequence[Row]) -> None:
        if rows:
            self.events.append(("end", tuple(row.key for row in rows)))


def test_rows_join_as_others_leave() -> None:
    """Guards continuous batching: never more than max_rows, each row begins and ends once, in its place."""
    journal, target = Journal(), ToyTarget()
    sizes = [e.step.num_rows for e in make(journal, target).run(make_rows(1, 3, 2, 2), max_rows=2)]
    assert [event for event in journal.events if event[0] != "observe"] == [
        ("begin", (0, 1)),
        ("propose", (0, 1)),
        ("end", (0,)),
        ("begin", (2,)),
        ("propose", (1, 2)),
        ("propose", (1, 2)),
        ("end", (1, 2)),
        ("begin", (3,)),
        ("propose", (3,)),
        ("propose", (3,)),
        ("end", (3,)),
    ]
    assert sizes == [2, 2, 2, 2, 2, 2, 1, 1]
    assert target.open_keys == set()


def test_without_a_limit_all_rows_run_at_once_and_no_rows_are_no_work() -> None:
    assert [e.step.num_rows for e in make(NoDrafter()).run(make_rows(1, 1, 1))] == [3, 3, 3]
    assert list(make(NoDrafter()).run([])) == []


def test_rows_are_taken_only_when_there_is_room() -> None:
    """Guards streams of requests: a waiting row is not even built before its turn."""
    built = list[int]()

    def requests() -> Iterator[Row]:
        for row in make_rows(2, 2, 2):
            built.append(row.key)
            yield row

    run = make(NoDrafter()).run(requests(), max_rows=1)
    next(run)
    assert built == [0]
    assert len(list(run)) == 5
    assert built == [0, 1, 2]


@pytest.mark.parametrize("kind", [CERTAIN, INDEPENDENT, TWO_MODELS], ids=["certain", "independent", "two models"])
@pytest.mark.parametrize("stop", [None, 2])
def test_statistics_add_up_to_the_text(kind: Kind, stop: int | None) -> None:
    """Guards benchmarks: each emitted token is in one step, and tokens behind the end count for nobody."""
    rows = make_rows(9, 4, 7, 1, 8, 5)
    steps: dict[int, list[Step]] = {row.key: [] for row in rows}
    for emission in make(ToyDrafter(kind, full(2, 1, 1)), stop=stop).run(rows, max_rows=4):
        steps[emission.row.key].append(emission.step)
    for row in rows:
        mine = steps[row.key]
        assert [token for step in mine for token in step.tokens] == row.tokens[2:]
        assert [step.index for step in mine] == list(range(row.num_steps))
        assert [step.finished for step in mine] == [False] * (len(mine) - 1) + [True]
        assert row.num_emitted <= row.max_tokens - 2
        assert row.tokens[-1] == stop or row.num_left == 0
        assert stop not in row.tokens[2:-1]
        position = 2
        for step in mine:
            assert step.position == position
            assert step.tree_tokens[0] == row.tokens[position - 1]
            assert len(step.nodes) == len(step.tokens)
            assert [step.tree_parents[node] for node in step.nodes] == [-1, *step.nodes[:-1]]
            assert [step.tree_tokens[node] for node in step.nodes[1:]] == list(step.tokens[: step.num_accepted])
            assert step.num_drafted == len(step.tree_parents) - 1
            position += len(step.tokens)


def test_seconds_of_a_pass_are_shared_by_its_rows() -> None:
    """Guards throughput: the shares of all rows add up to the clock."""
    ticks = iter(range(10**6))
    decoder = replace(make(ToyDrafter(CERTAIN, chain(2))), clock=lambda: float(next(ticks)))
    for emission in decoder.run(make_rows(4, 4)):
        step = emission.step
        shares = (step.draft_s, step.score_s, step.verify_s)
        assert [share * step.num_rows for share in shares] == [3, 1, 1]  # observing and learning count as drafting


@dataclass(frozen=True, slots=True)
class AcceptsAll:
    """A verifier that takes the first child as long as there is one, then emits ``last``."""

    last: int
    name: str = "accepts all"
    lossless: bool = False
    chain_only: bool = False
    draws: frozenset[Draw] = frozenset(Draw)

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        nodes, children = [0], tree.children()
        while children[nodes[-1]]:
            nodes.append(children[nodes[-1]][0])
        return Verdict(tuple(nodes), (*tree.path_tokens(nodes[-1]), self.last))


@dataclass(slots=True)
class Fixed:
    """A drafter that proposes the same chain below ``root`` (None: the right one) as far as the limit lets it."""

    tokens: tuple[int, ...]
    root: int | None = None
    num_trees: int | None = None
    is_obedient: bool = True  # to the limit
    name: str = "fixed"

    def begin(self, rows: Sequence[Row]) -> None: ...

    def propose(
        self,
        rows: Sequence[Row],
        limits: Sequence[Limit],
        params: SamplingParams,
        rng: Rng,
    ) -> list[TokenTree]:
        trees = []
        for row, limit in zip(rows, limits, strict=True):
            length = min(limit.depth, limit.nodes) if self.is_obedient else len(self.tokens)
            trees.append(TokenTree.chain(row.tokens[-1] if self.root is None else self.root, self.tokens[:length]))
        return trees[: self.num_trees]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None: ...

    def end(self, rows: Sequence[Row]) -> None: ...


@pytest.mark.parametrize(
    ("stop", "length", "emitted", "nodes"),
    [
        (None, 5, (0, 1, 2, 0), (0, 1, 2, 3)),
        (None, 4, (0, 1, 2, 0), (0, 1, 2, 3)),
        (None, 2, (0, 0), (0, 1)),
        (None, 1, (0,), (0,)),
        (1, 9, (0, 1), (0, 1)),
        (0, 9, (0,), (0,)),
    ],
)
def test_tokens_accepted_behind_the_end_are_dropped(
    stop: int | None, length: int, emitted: tuple[int, ...], nodes: tuple[int, ...]
) -> None:
    """Guards text behind the end of text, and acceptance rates that count it."""
    row = make_rows(length)[0]
    decoder = replace(make(Fixed((0, 1, 2)), stop=stop), verifier=AcceptsAll(last=0))
    step = next(decoder.run([row])).step
    assert (step.tokens, step.nodes, tuple(row.tokens[2:])) == (emitted, nodes, emitted)
    assert step.finished == (length <= 4 or stop is not None)


def test_a_tree_may_be_as_deep_as_the_text_still_grows_but_for_the_targets_own_token() -> None:
    journal = Journal()
    list(make(journal, ToyTarget(chain_only=True)).run(make_rows(3)))
    assert journal.limits == [Limit(2, 6, True), Limit(1, 6, True), Limit(0, 6, True)]


def test_leaving_early_frees_every_row() -> None:
    """Guards caches of abandoned streams."""
    drafter, target = ToyDrafter(CERTAIN, UNBALANCED), ToyTarget()
    run = make(drafter, target).run(make_rows(9, 9, 9), max_rows=2)
    assert isinstance(run, Generator)
    next(run)
    assert target.open_keys == drafter.begun == {0, 1}
    run.close()
    assert target.open_keys == drafter.begun == set()


def test_an_error_frees_every_row_and_is_not_swallowed() -> None:
    """Guards measurements that go on after a failure."""
    journal, target = Journal(fail_at=2), ToyTarget()
    with pytest.raises(RuntimeError, match="the draft model broke"):
        list(make(journal, target).run(make_rows(9, 9, 1)))
    assert journal.events[-1] == ("end", (0, 1))
    assert target.open_keys == set()


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (Fixed((0,), root=2), "must root its tree at the row's newest token, got 2"),
        (Fixed((0,), num_trees=1), "must propose one tree for each of 2 rows, got 1"),
        (Fixed((0,) * 4, is_obedient=False), r"must keep within Limit\(depth=3, nodes=6"),
        (Fixed((0,) * 7, is_obedient=False), r"must keep within Limit\(depth=3, nodes=6"),
        (Fixed((0, 3)), "must propose token ids of the target's vocabulary, 0 to 2, got 3"),
        (Fixed((0, -1)), "must propose token ids of the target's vocabulary, 0 to 2, got -1"),
    ],
    ids=["wrong root", "too few", "too deep", "too many", "token behind the vocabulary", "negative token"],
)
def test_trees_that_do_not_fit_their_rows_are_refused(drafter: Fixed, message: str) -> None:
    """Guards drafters that lag behind by a token, trees larger than caches and budgets allow, and ids without an embedding."""
    target = ToyTarget()
    with pytest.raises(ValueError, match=f"drafter 'fixed' {message}"):
        list(make(drafter, target).run(make_rows(4, 4)))
    assert target.open_keys == set()


def test_every_step_emits_at_least_one_token() -> None:
    """Guards progress: a bad drafter makes it slow, never stuck."""
    rows = make_rows(30)
    emissions = list(replace(make(Fixed((2, 2, 2))), verifier=MatchVerifier()).run(rows))
    assert all(e.step.tokens for e in emissions)
    assert rows[0].num_emitted == 30


def test_a_row_that_joins_with_a_long_prompt_does_not_widen_the_pass_of_the_others() -> None:
    assert grouped(range(32), [1] * 31 + [120]) == [slice(0, 31), slice(31, 32)]
    assert grouped(range(4), [5, 6, 4, 1]) == [slice(0, 4)]


def test_rows_that_are_not_neighbours_in_the_cache_never_share_a_pass() -> None:
    assert grouped([0, 1, 3, 4], [1, 1, 1, 1]) == [slice(0, 2), slice(2, 4)]


def test_the_groups_have_the_least_padded_columns() -> None:
    """Against every way of cutting eight parts."""
    sizes = [30, 40, 200, 90, 45, 33, 60, 20]

    def columns(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(sizes)]
        return sum(max(sizes[a:b]) * (b - a) + PASS_COLUMNS for a, b in pairwise(edges))

    best = min(columns(cuts) for n in range(8) for cuts in combinations(range(1, 8), n))
    found = grouped(range(8), sizes)
    assert columns(tuple(run.start for run in found[1:])) == best
