"""Acceptance, speedup and comparison, recomputed from the lines of a real trace without any of the library's code."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.analysis import acceptance, nodes, speedup
from specdec.analysis.columns import BASELINE
from specdec.analysis.compare import compare
from specdec.analysis.intervals import geometric_mean, ratio_of_sums
from specdec.analysis.load import load
from specdec.analysis.results import Bench, load_result
from specdec.analysis.speedup import CostModel
from specdec.interfaces import Step
from specdec.stats import Stats

DATA = Path(__file__).resolve().parents[2] / "notebooks" / "data"
METHODS = ("plain", "ngram", "recycling", "hybrid")


@pytest.fixture(scope="module")
def trace() -> Any:
    return load(DATA / "bench.jsonl")


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "bench.jsonl").read_text("utf-8").splitlines()]


def steps_of(lines: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["type"] == "step" and line["method"] == method]


@pytest.mark.parametrize("method", METHODS)
def test_the_summary_is_that_of_the_stats_that_were_counted_live(
    trace: Any, lines: list[dict[str, Any]], method: str
) -> None:
    stats = Stats()
    for line in steps_of(lines, method):
        stats.add(Step(**{name: line[name] for name in Step.__dataclass_fields__}))
    (found,) = acceptance.summarise(trace.select(method))
    assert found.num_drafts == stats.num_drafts
    assert found.num_draft_tokens == stats.num_draft_tokens
    assert found.num_tokens == stats.num_tokens
    assert found.mean_acceptance_length.value == pytest.approx(stats.mean_acceptance_length, abs=1e-12)
    assert found.acceptance_rate == pytest.approx(stats.acceptance_rate)
    assert list(found.num_accepted_tokens_per_pos) == stats.num_accepted_tokens_per_pos
    assert list(found.acceptance_rate_per_pos) == pytest.approx(stats.acceptance_rate_per_pos)
    assert list(found.acceptance_histogram) == stats.acceptance_histogram
    assert found.score_s == pytest.approx(stats.score_s)


def attempts_by_hand(lines: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """One dict for each kept node at which something was proposed and the text did not end."""
    texts = {int(k): v for line in lines if line["type"] == "vocabulary" for k, v in line["texts"].items()}
    found = []
    for step in steps_of(lines, method):
        for depth, node in enumerate(step["nodes"]):
            children = [i for i, parent in enumerate(step["tree_parents"]) if parent == node]
            is_last = depth + 1 == len(step["nodes"])
            if not children or (is_last and step["finished"]):
                continue
            kept = None if is_last else children.index(step["nodes"][depth + 1])
            found.append({"depth": depth, "rank": kept, "category": step["category"], "entropy": step["entropies"][depth],
                          "kind": acceptance.token_class(texts[step["tokens"][depth]])})  # fmt: skip
    return found


@pytest.mark.parametrize("method", METHODS[1:])
def test_conditional_rates_recomputed(trace: Any, lines: list[dict[str, Any]], method: str) -> None:
    own = trace.select(method)
    by_hand = attempts_by_hand(lines, method)

    def counts(key: str) -> dict[str, tuple[int, int]]:
        tried, met = (
            Counter(str(a[key]) for a in by_hand),
            Counter(str(a[key]) for a in by_hand if a["rank"] is not None),
        )
        return {value: (tried[value], met[value]) for value in tried}

    for key, rates in (
        ("depth", acceptance.by_depth(own)),
        ("category", acceptance.by_category(own)),
        ("kind", acceptance.by_token_class(own)),
    ):
        assert {r.key: (r.num_proposed, r.num_met) for r in rates} == counts(key)
    low = next(rate for rate in acceptance.by_entropy(own) if rate.key == "below 0.05")
    assert low.num_proposed == sum(a["entropy"] < 0.05 for a in by_hand)
    table, visits = acceptance.by_rank(own)
    hits = Counter((a["depth"], a["rank"]) for a in by_hand if a["rank"] is not None)
    for (depth, rank), share in np.ndenumerate(table):
        assert share * visits[depth] == pytest.approx(hits[depth, rank])


def test_speedups_are_those_of_the_bench(trace: Any) -> None:
    """The bench counted them while it ran; the analysis has the trace alone."""
    result = load_result(DATA / "bench.json")
    assert isinstance(result, Bench)
    found, decode = speedup.speedups(trace), speedup.speedups(trace, decode_only=True)
    for name, estimate in found.items():
        row = result.row(name)
        assert estimate.value == pytest.approx(row["speedup"], rel=1e-12)
        assert (estimate.low, estimate.high) == pytest.approx((row["speedup_low"], row["speedup_high"]), rel=1e-12)
        if name in METHODS:
            assert decode[name].value / decode["plain"].value == pytest.approx(
                row["speedup_decode"] / result.row("plain")["speedup_decode"], rel=1e-9
            )
    assert set(found) == {*METHODS, BASELINE, "hf-prompt-lookup"}


def test_passes_of_a_batch_are_counted_once(tmp_path: Path) -> None:
    """Rows of one pass stand in lines of their own, each with its share."""
    head = {"schema": 1, "type": "provenance"}
    same = {"type": "step", "method": "ngram", "drafter": "ngram", "verifier": "match", "category": "c", "turn": 0,
            "num_rows": 2, "draft_s": 0.1, "verify_s": 0.01, "finished": False, "tokens": [1], "nodes": [0],
            "num_accepted": 0, "position": 5}  # fmt: skip
    rows = [
        same | {"row": row, "question_id": str(row), "index": index, "score_s": 0.5 + index,
                "tree_tokens": [7] * (1 + row), "tree_parents": list(range(-1, row)), "num_drafted": row}
        for index in range(3) for row in (0, 1)
    ]  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *rows, {"type": "end"})))
    found = speedup.passes(load(path))
    assert found.columns.tolist() == [4, 4]  # two passes behind the prompt's, two rows as wide as the wider tree
    assert found.score_s.tolist() == [3.0, 5.0]


def test_the_cost_model_by_hand() -> None:
    model = CostModel(fixed_s=8.0, column_s=1.0, level_s=0.5, other_s=1.0)
    assert model.v(4) == pytest.approx(12 / 9)
    assert model.v(4, num_rows=8) == pytest.approx(40 / 16)
    assert model.speedup(2.0, columns=4, levels=2) == pytest.approx(2 * 10 / (12 + 1 + 1))
    rows = model.break_even_rows(2.0, columns=4, levels=2)
    batch = 8 + rows  # one row's plain step costs 8 + B + 1
    assert 2 * (batch + 1) == pytest.approx(8 + 4 * rows + 1 + 1)
    for size, is_faster in ((rows * 0.99, True), (rows * 1.01, False)):
        gained = 2 * (8 + size + 1) / (8 + 4 * size + 2)
        assert (gained > 1) is is_faster


@pytest.mark.parametrize(("tau", "columns", "expected"), [(2.0, 2, math.inf), (1.0, 4, 0.0)])
def test_some_drafts_always_pay_and_some_never(tau: float, columns: int, expected: float) -> None:
    assert CostModel(8.0, 1.0, 0.0, 1.0).break_even_rows(tau, columns, 1) == expected


def test_the_fit_finds_the_costs_that_made_a_trace(trace: Any) -> None:
    """Seconds are replaced by known ones; a fit that mixes up columns, rows or prompts' passes finds others."""
    from dataclasses import replace

    steps = trace.steps
    levels = nodes.tree_shapes(trace).levels
    made = replace(
        steps,
        score_s=0.03 + 0.002 * (steps.num_drafted + 1) + 5.0 * (steps.index == 0),
        draft_s=levels * 0.0005,
        verify_s=np.full(len(steps), 0.001),
    )
    model = speedup.fit(replace(trace, steps=made))
    assert (model.fixed_s, model.column_s) == (pytest.approx(0.03), pytest.approx(0.002))
    assert (model.level_s, model.other_s) == (pytest.approx(0.0005), pytest.approx(0.001))


def test_predictions_are_near_what_was_measured(trace: Any) -> None:
    """Nothing of the clock of the drafting methods' outputs is in the model, only costs of passes."""
    found = speedup.predict(trace, speedup.fit(trace))
    assert [each.name for each in found] == ["ngram", "recycling", "hybrid"]
    for each in found:
        assert each.measured.low * 0.8 < each.predicted < each.measured.high * 1.25


def test_comparing_finds_what_is_there_and_nothing_else(trace: Any) -> None:
    same = compare(trace.select("ngram"), trace.select("ngram"))
    assert (same.speed.value, same.p_value, same.num_faster, same.num_same_text) == (1.0, 1.0, 0, 16)
    assert "no difference in speed is proved" in same.verdict
    better = compare(trace.select("recycling"), trace.select(BASELINE))
    assert better.speed.value == pytest.approx(speedup.speedups(trace)["recycling"].value)
    assert better.p_value < 0.01
    assert "recycling is faster than hf-generate" in better.verdict
    worse = compare(trace.select(BASELINE), trace.select("recycling"))
    assert worse.speed.value == pytest.approx(1 / better.speed.value)
    assert "slower" in worse.verdict
    with pytest.raises(ValueError, match="one method with another"):
        compare(trace, trace)


def test_random_signs_have_the_stated_false_alarm_rate() -> None:
    """Of 400 comparisons without any difference 5 % are expected below 0.05; 8.5 % or more is a 0.2 % chance."""
    from specdec.analysis.compare import _sign_test

    random = np.random.default_rng(1)
    alarms = sum(_sign_test(random.normal(size=12)) < 0.05 for _ in range(400))
    assert 8 <= alarms < 34


def test_intervals_cover_and_know_their_prompts() -> None:
    found = ratio_of_sums(np.array([1.0, 3.0, 0.0]), np.array([2.0, 2.0, 0.0]), plus=1.0)
    assert (found.value, found.num_prompts) == (2.0, 2)
    assert (found.low, found.high) == (1.5, 2.5)
    assert geometric_mean([2.0, 8.0], [1, 1]).value == pytest.approx(4.0)
    assert math.isnan(ratio_of_sums(np.zeros(0), np.zeros(0)).value)
    assert str(geometric_mean([2.0])) == "2.00"


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" word", "word start"), ("ing", "word part"), ("3", "number"), (" 12", "number"), (", ", "punctuation"),
     ("\n\n", "space"), ("", "other"), ("é", "word part")],
)  # fmt: skip
def test_token_classes(text: str, kind: str) -> None:
    assert acceptance.token_class(text) == kind


def test_depths_and_ranks_of_nodes(trace: Any) -> None:
    expected_depths, expected_ranks = [], []
    steps = trace.steps
    for begin, end in zip(steps.tree_offsets[:-1], steps.tree_offsets[1:], strict=True):
        parents = steps.tree_parents[begin:end].tolist()
        seen: dict[int, int] = defaultdict(int)
        depth: list[int] = []
        for parent in parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
            expected_ranks.append(0 if parent < 0 else seen[parent])
            seen[parent] += 1
        expected_depths += depth
    assert nodes.node_depths(trace).tolist() == expected_depths
    assert nodes.sibling_ranks(trace).tolist() == expected_ranks


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("x", "not a JSON file"), ("{}", "no result of specdec"), ('{"rows": [], "schema": 9}', "schema 9"),
     ('{"rows": [{}], "schema": 1, "provenance": {}}', "damaged")],
)  # fmt: skip
def test_other_files_are_no_results(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load_result(path)
