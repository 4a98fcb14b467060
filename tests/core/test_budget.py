"""How large drafts may be: costs, calibration, and whole runs of the adaptive budget in simulated time.

Nothing here is timed: seconds are added up from known costs (see steps.py), so every figure is the same at each run.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import pytest
from steps import BFLOAT16, FLOAT32, Drafts, Simulation

from specdec.budget.adaptive import AdaptiveBudget, FixedBudget, make_budget
from specdec.budget.calibration import Calibration, DepthRates
from specdec.budget.costs import PassCosts
from specdec.interfaces import Limit, Row, Verdict
from specdec.tree import TokenTree

CURVES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
SIZES = (2, 3, 5, 8, 12, 16)

# Nothing that these propose is ever accepted.
USELESS = {
    "cheap": Drafts(rate=0.0, believed=0.8),
    "cheap and sure of itself": Drafts(rate=0.0, believed=0.99),
    "cheap, without estimates": Drafts(rate=0.0, believed=None),
    "a model": Drafts(rate=0.0, believed=0.8, length=5, level_s=0.2),
    "a model, without estimates": Drafts(rate=0.0, believed=None, length=5, level_s=0.3),
}
GOOD = {
    "cheap": Drafts(rate=0.8, believed=0.8),
    "cheap, wrong about itself": Drafts(rate=0.8, believed=0.6),
    "cheap, without estimates": Drafts(rate=0.9, believed=None),
    "a model": Drafts(rate=0.8, believed=0.8, length=8, level_s=0.1),
    "a model, without estimates": Drafts(rate=0.8, believed=None, length=8, level_s=0.1),
}


def best_fixed(name: str, curve: str) -> float:
    """Expected tokens a second of the best fixed size: 1 + r + r^2 + ... tokens in the time of a step."""
    drafts = GOOD[name]
    lengths = [min(size, drafts.length) for size in SIZES]
    tokens = [sum(drafts.rate**depth for depth in range(length + 1)) for length in lengths]
    seconds = [CURVES[curve](length + 1) + drafts.seconds(length) for length in lengths]
    return max(n / s for n, s in zip(tokens, seconds, strict=True))


def runs(drafts, curve, num_steps, rng, seeds):
    return [Simulation(AdaptiveBudget(16), drafts, curve, rng, seed=seed).run(num_steps) for seed in seeds]


@pytest.mark.parametrize("rng", [0.0, 0.2])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name", USELESS)
def test_a_useless_drafter_costs_at_most_three_percent_of_a_run(name, curve, rng):
    for run in runs(USELESS[name], CURVES[curve], 2000, rng, range(2 if rng else 1)):  # no noise: all seeds are alike
        assert run.tokens == 2000
        assert run.seconds <= 1.03 * 2000


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name", USELESS)
def test_a_useless_drafter_costs_at_most_five_percent_of_the_first_answer(name, curve):
    """A cold start: neither costs nor acceptance are known."""
    (run,) = runs(USELESS[name], CURVES[curve], 128, 0.0, [0])
    assert run.seconds <= 1.05 * 128
    noisy = runs(USELESS[name], CURVES[curve], 128, 0.2, range(8))
    assert mean(run.seconds for run in noisy) <= 1.05 * 128


@pytest.mark.parametrize("rng", [0.0, 0.2])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name", GOOD)
def test_a_good_drafter_is_used_as_well_as_by_the_best_fixed_size(name, curve, rng):
    """Times that vary by a fifth from pass to pass hide which of two near sizes is better."""
    fixed = best_fixed(name, curve)
    adaptive = mean(run.speedup for run in runs(GOOD[name], CURVES[curve], 2000, rng, range(2)))
    assert fixed > 1.3
    assert adaptive >= (0.92 if rng else 0.95) * fixed


@pytest.mark.parametrize("curve", CURVES)
def test_where_drafts_are_right_only_at_times_no_fixed_size_does_as_well(curve):
    """Estimates tell the steps apart, so size follows them."""
    drafts, costs = Drafts(rate=0.85, believed=0.85, hit_share=0.4), CURVES[curve]
    fixed = max(Simulation(FixedBudget(s), drafts, costs).run(2000).speedup for s in (0, *SIZES))
    (run,) = runs(drafts, costs, 2000, 0.0, [0])
    assert run.speedup > 1.05 * fixed


def test_a_weak_drafter_is_used_where_columns_are_cheap_and_not_where_they_are_dear():
    drafts = Drafts(rate=0.3, believed=0.8)
    cheap = runs(drafts, BFLOAT16, 2000, 0.0, [0])[0]
    dear = runs(drafts, FLOAT32, 2000, 0.0, [0])[0]
    assert cheap.speedup > 1.3
    assert mean(cheap.sizes) > 1
    assert dear.speedup > 0.97
    assert mean(dear.sizes) < 0.2


def test_costly_drafts_rest_longer_than_cheap_ones():
    """What a failed probe costs decides how often it is tried."""
    cheap = runs(Drafts(rate=0.0, believed=None, length=2), BFLOAT16, 2000, 0.0, [0])[0]
    dear = runs(Drafts(rate=0.0, believed=None, length=2, level_s=0.5), BFLOAT16, 2000, 0.0, [0])[0]
    assert sum(n > 0 for n in cheap.drafted) > 4 * sum(n > 0 for n in dear.drafted) > 0


def test_drafting_comes_back_when_it_pays_again():
    budget = AdaptiveBudget(16)
    bad = Simulation(budget, Drafts(rate=0.0, believed=None), BFLOAT16).run(500)
    good = Simulation(budget, Drafts(rate=0.8, believed=None), BFLOAT16).run(500)
    assert bad.seconds <= 1.03 * 500
    assert sum(n > 0 for n in good.drafted) > 400


def test_gains_of_long_ago_do_not_pay_for_much():
    """After a good text the loss on a bad one is bounded by what the account holds at most."""
    budget = AdaptiveBudget(16)
    Simulation(budget, Drafts(rate=0.9, believed=None), BFLOAT16).run(1000)
    bad = Simulation(budget, Drafts(rate=0.0, believed=None), BFLOAT16).run(200)
    assert bad.seconds <= 200 + 6 + 0.015 * 200 + 0.5


def test_a_model_drafts_no_deeper_than_pays():
    """Levels cost time before anything can be cut: the depth itself must be limited."""
    run = runs(Drafts(rate=0.5, believed=None, length=12, level_s=0.15), BFLOAT16, 1000, 0.0, [0])[0]
    late = [n for n in run.drafted[200:] if n]
    assert run.speedup > 1.15
    assert mean(late) < 5


def test_a_row_never_gets_more_depth_than_it_has_tokens_left():
    row = Row(0, [1, 2], 5)
    for budget in (AdaptiveBudget(16), FixedBudget(16)):
        (limit,) = budget.limits([row], True)
        assert (limit.depth, limit.nodes, limit.chain_only) == (2, 16, True)
        assert limit.num_levels <= 2


def test_seeded_costs_leave_nothing_to_be_measured_first():
    budget = AdaptiveBudget(16, PassCosts.seeded({1: {1: 0.02, 17: 0.03}}))
    row = Row(0, [1], 100)
    row.num_steps = 5
    assert budget.limits([row], False)[0].depth > 0
    cold = AdaptiveBudget(16)
    assert cold.limits([row], False)[0].depth == 0


def test_a_cut_keeps_what_brings_most_tokens_a_second():
    budget = AdaptiveBudget(16, PassCosts.seeded({1: {1: 1.0, 2: 1.1, 3: 1.2, 4: 2.0}}))
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 1, 2), estimates=(1.0, 0.9, 0.8, 0.7))
    (cut,) = budget.cut([Row(0, [1], 9)], [tree])
    assert cut.tokens == (1, 2, 3)


def test_drawn_trees_and_trees_without_estimates_are_never_cut():
    """Dropping a drawn node for being improbable would not be exact."""
    budget = AdaptiveBudget(16, PassCosts.seeded({1: {1: 1.0, 2: 50.0}}))
    tree = TokenTree((1, 2), (-1, 0))
    assert budget.cut([Row(0, [1], 9)], [tree]) == [tree]


def test_rows_of_one_pass_share_its_size():
    """A pass costs what its largest tree costs, so the gain of all rows is weighed against that."""
    costs = PassCosts.seeded({2: {1: 1.0, 2: 1.5}})
    likely = TokenTree((1, 2), (-1, 0), estimates=(1.0, 0.9))
    unlikely = TokenTree((1, 2), (-1, 0), estimates=(1.0, 0.02))
    rows = [Row(0, [1], 9), Row(1, [1], 9)]
    assert [len(t) for t in AdaptiveBudget(16, costs).cut(rows, [likely, likely])] == [2, 2]
    assert [len(t) for t in AdaptiveBudget(16, costs).cut(rows, [likely, unlikely])] == [1, 1]


def test_costs_are_medians_that_never_fall_with_size():
    costs = PassCosts()
    for hiccup in (1.0, 1.0, 9.0):
        costs.add(1, 1, 1.0 * hiccup)
        costs.add(1, 3, 2.0 * hiccup)
        costs.add(1, 4, 1.5 * hiccup)  # lucky: averaged with its neighbour
        costs.add(1, 5, 2.5 * hiccup)
    assert costs.curve(1, 5) == pytest.approx([1.0, 1.375, 1.75, 1.75, 2.5])
    assert costs.curve(4, 1) == [1.0], "another number of rows: the nearest known"
    assert costs.curve(1, 6)[-1] > 2.5
    assert (costs.count(1, 1), costs.knows(1, 2), costs.knows(64, 1)) == (3, False, False)


def test_threads_may_share_the_costs_of_a_model():
    """Another call's first pass of a new size came while the sizes were looked through: a RuntimeError."""
    costs = PassCosts()
    costs.add(1, 1, 0.1)

    stop = threading.Event()

    def add():
        sizes = itertools.cycle(range(1, 200))
        while not stop.is_set():
            size = next(sizes)
            costs.add(size, 1 + size % 33, 0.2, size * 7.0)

    with ThreadPoolExecutor() as pool:
        adding = pool.submit(add)
        try:
            for size in range(1, 300):
                assert len(costs.curve(size, 3, 5.0 * size)) == 3
                costs.count(size, 2)
                costs.largest(size)
        finally:
            stop.set()
        adding.result()


def test_measured_costs_replace_the_seed():
    costs = PassCosts.seeded({1: {1: 1.0}})
    for _ in range(10):
        costs.add(1, 1, 3.0)
    assert costs.curve(1, 1) == [3.0]


def test_a_calibration_counts():
    calibration = Calibration()
    before = calibration.value(0.9)
    for i in range(100):
        calibration.learn(0.9, i % 2 == 0)
    assert before > 0.8
    assert calibration.value(0.9) == pytest.approx(0.5, abs=0.05)
    assert calibration.value(0.1) < 0.15, "other estimates are not touched"


def test_expected_acceptance_by_depth_counts_what_was_reached():
    depths = DepthRates()
    for _ in range(50):
        depths.learn(3, 1)
        depths.learn(1, 1)
    expected = depths.expected()
    assert expected[1] == pytest.approx(1.0, abs=0.02)
    assert expected[3] - expected[1] < 0.1


@pytest.mark.parametrize(("adaptive", "kind"), [(True, AdaptiveBudget), (False, FixedBudget)])
def test_a_budget_is_made_by_size(adaptive, kind):
    assert isinstance(make_budget(4, adaptive), kind)
    with pytest.raises(ValueError, match="max_nodes must be 0 or more, got -1"):
        make_budget(-1, adaptive)


def test_a_fixed_budget_is_always_the_same():
    budget = FixedBudget(3)
    row, tree = Row(0, [1], 50), TokenTree.chain(1, (2, 3))
    budget.learn([row], [tree], [Verdict((0,), (1,))], 1.0, 1.0)
    assert budget.cut([row], [tree]) == [tree]
    assert budget.limits([row], False) == [Limit(48, 3, False)]


def test_rows_in_one_line_share_the_nodes_that_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of all rows count together there: a row whose draft promises more gets more of them."""
    costs = PassCosts()
    for columns in (1, 2, 3, 5, 9, 17):
        for _ in range(9):
            costs.add(2, columns, 1 + 0.2 * (columns - 1), 100)
    rows = [Row(key, [1] * 100, 200) for key in range(2)]
    chain = (-1, 0, 1, 2, 3, 4, 5, 6)
    trees = [TokenTree(tuple(range(8)), chain, estimates=tuple(rate**i for i in range(8))) for rate in (0.95, 0.3)]

    monkeypatch.setattr(Calibration, "values", lambda self, tree: list(tree.estimates))

    def sizes(in_line: bool) -> list[int]:
        budget = AdaptiveBudget(16, costs, in_line=in_line)
        return [len(tree) - 1 for tree in budget.cut(rows, trees)]

    sure, unsure = sizes(in_line=True)
    assert sure >= 6
    assert unsure <= 2
    assert len(set(sizes(in_line=False))) == 1
