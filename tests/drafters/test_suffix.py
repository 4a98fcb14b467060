"""Suffix trees through arctic-inference: exact, within limits, bounded; a plain sentence where it is missing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from onerow import batch, make_model, propose
from transformers import LlamaForCausalLM

import specdec
from specdec.drafters.suffix import SuffixDrafter
from specdec.interfaces import Row, Scores, Step, Verdict


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    with pytest.raises(ValueError, match=r"pip install 'specdec-toolkit\[suffix\]'"):
        SuffixDrafter()


@pytest.fixture
def _library() -> None:
    pytest.importorskip("arctic_inference.suffix_decoding", reason="needs pip install 'specdec-toolkit[suffix]'")


installed = pytest.mark.usefixtures("_library")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


def emit(d: SuffixDrafter, row: Row, *tokens: int) -> None:
    tree = propose(d, row)
    row.tokens += tokens
    row.num_new = len(tokens)
    verdict = Verdict(tuple(range(len(tokens))), tokens)  # it looks at the tokens alone
    d.observe([row], [tree], [verdict], [Scores(torch.empty(0))])


@installed
@pytest.mark.parametrize("rows", [[[5, 9, 12, 7]], [[5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8, 9], [30]]], ids=["1", "3"])
def test_greedy_text_is_that_of_generate(model: LlamaForCausalLM, rows: list[list[int]]) -> None:
    inputs = batch(*rows)
    expected = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    d = SuffixDrafter(min_prob=0.001, min_gain=0.0)
    lengths = []
    for _ in range(2):  # the second time the output is known
        steps: list[Step] = []
        found = specdec.generate(
            model, **inputs, max_new_tokens=48, do_sample=False, drafter=d, adaptive=False, on_step=steps.append
        )
        assert torch.equal(found, expected)
        lengths.append(len(steps))
    assert lengths[1] < lengths[0] / 2
    assert not d._ids
    assert not d._matches
    assert not d._own.active_requests


@installed
@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_sampled_text_of_a_seed_does_not_depend_on_what_is_remembered(model: LlamaForCausalLM, verifier: str) -> None:
    inputs = batch([5, 9, 12, 7], [30])
    options: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": True,
        "seed": 3,
        "verifier": verifier,
        "adaptive": False,
    }
    found = specdec.generate(model, **inputs, drafter="suffix", **options)
    if verifier == "match":
        assert torch.equal(found, specdec.generate(model, **inputs, drafter="none", **options))


@installed
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("nodes", [0, 1, 5, 30])
@pytest.mark.parametrize("chain_only", [False, True])
def test_trees_keep_within_the_limit(depth: int, nodes: int, chain_only: bool) -> None:
    d = SuffixDrafter(min_prob=0.0, min_gain=0.0)
    row = Row(0, [7, *range(10), 7, *range(20), 3, 7], 500)
    d.begin([row])
    tree = propose(d, row, depth, nodes, chain_only)
    assert len(tree) - 1 <= nodes
    assert max(tree.depths()) <= depth
    assert tree.is_certain
    assert not chain_only or tree.is_chain
    assert len(tree) > 1 or not depth or not nodes
    assert len(tree.estimates) == len(tree)
    assert all(tree.estimates[i] <= tree.estimates[p] for i, p in enumerate(tree.parents) if p >= 0)


@installed
def test_long_matches_outweigh_short_ones_and_equal_paths_are_united() -> None:
    d = SuffixDrafter(min_prob=0.0, min_gain=0.0)
    row = Row(0, [1, 2, 3, 4, 5, 9, 3, 8, 9, 3, 8, 1, 2, 3], 500)
    d.begin([row])
    tree = propose(d, row, nodes=16)
    below = {tree.tokens[child]: tree.estimates[child] for child in tree.children()[0]}
    assert set(below) == {4, 8}  # each once, though several matches hold 4
    assert below[4] > below[8] > 0
    assert sum(below.values()) <= 1


@installed
@pytest.mark.parametrize("length", range(1, 12))
def test_a_match_of_exactly_the_length_asked_for_is_found(length: int) -> None:
    """The library chooses the length by itself; a budget that suits one length only leaves it no choice."""
    from specdec.drafters.suffix import _ask

    d = SuffixDrafter()
    tail = list(range(20, 20 + length))
    row = Row(0, [*tail, 50, 19, 18, *tail], 500)
    d.begin([row])
    draft = _ask(d._own, d._ids[row], row.tokens, length, 4)
    assert draft is not None
    assert draft.match_len == length
    assert draft.token_ids[0] == 50
    assert _ask(d._own, d._ids[row], row.tokens, length + 1, 4) is None


@installed
def test_earlier_outputs_are_shared_and_prompts_are_not() -> None:
    d = SuffixDrafter(min_prob=0.0, min_gain=0.0)
    first = Row(0, [1, 2, 3], 500)
    d.begin([first])
    emit(d, first, 10, 11, 12, 13, 14)
    second = Row(1, [40, 10, 11], 500)
    d.begin([second])
    assert len(propose(d, second)) == 1  # still being written
    d.end([first])
    assert propose(d, second).tokens == (11, 12, 13, 14)
    third = Row(2, [40, 1, 2], 500)
    d.begin([third])
    assert len(propose(d, third)) == 1


@installed
def test_without_a_store_rows_learn_from_themselves_alone() -> None:
    d = SuffixDrafter(max_cached=0, min_prob=0.0, min_gain=0.0)
    first, second = Row(0, [1, 2, 3], 500), Row(1, [40, 10, 11], 500)
    d.begin([first])
    emit(d, first, 10, 11, 12, 13, 14)
    d.end([first])
    d.begin([second])
    assert len(propose(d, second)) == 1


@installed
def test_memory_is_bounded() -> None:
    """The oldest outputs leave the store; nothing of a row stays but its output."""
    d = SuffixDrafter(max_cached=4)
    for key in range(12):
        row = Row(key, [1, 2, key], 500)
        d.begin([row])
        emit(d, row, *(30 + (key + i) % 30 for i in range(20)))
        d.end([row])
        assert len(d._earlier.cached_requests) == min(key + 1, 4)
    assert list(d._earlier.cached_requests) == [8, 9, 10, 11]
    assert not d._own.active_requests
    assert not d._own.cached_requests
    assert not d._ids


@installed
def test_rates_follow_what_comes() -> None:
    """Matches that are wrong lose their weight."""
    d = SuffixDrafter(min_prob=0.0, min_gain=0.0)
    row = Row(0, [1, 2, 1], 5000)
    d.begin([row])
    before = d._rates.rate(1)
    for i in range(40):
        emit(d, row, 3 + i, 1)  # 1 is always followed by what never followed it
    assert d._rates.rate(1) < before


@installed
def test_strangers_are_ignored_and_rows_end_before_their_first_step() -> None:
    d = SuffixDrafter()
    rows = [Row(0, [1, 2], 9), Row(1, [3, 4], 9)]
    d.begin(rows[:1])
    d.end(rows)
    assert not d._ids
    assert not d._own.active_requests
    assert not d._earlier.cached_requests


@installed
@pytest.mark.parametrize("option", [{"max_depth": 1}, {"max_cached": -1}], ids=str)
def test_values_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        SuffixDrafter(**option)
