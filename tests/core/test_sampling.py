"""Warpers and processors: the fused path is transformers', ties included, and every tree node sees its own history."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import specdec.distributions
from specdec.distributions import Histories, LogitsTransform, ProcessorTransform, WarperTransform
from specdec.errors import NonFiniteLogitsError
from specdec.interfaces import Row, Scores, TargetDistributions
from specdec.sampling import GREEDY, SamplingParams, sampling_probs
from specdec.tree import TokenTree

TREE = TokenTree((4, 1, 2, 4, 2, 1), (-1, 0, 0, 1, 3, 4))  # the root's token is the row's last
PADDING = 6


def row() -> Row:
    return Row(0, [3, 1, 2, 4], 40)


def at_nodes(logits_transform: LogitsTransform, logits: Tensor) -> TargetDistributions:
    return logits_transform.target_probs(row(), TREE, Scores(logits))


def warped(logits: Tensor, params: SamplingParams) -> Tensor:
    """What generate() samples from: transformers' warpers in its order."""
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    probs: Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)
    return probs


COMBINATIONS = [
    SamplingParams(*values)
    for values in itertools.product((1.0, 0.3, 1.7), (0, 1, 7, 5000), (1.0, 0.9, 0.2), (0.0, 0.02, 0.6))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [50, 2000])
def test_the_fast_path_equals_transformers_warpers(vocab: int, dtype: torch.dtype) -> None:
    """Every combination of warpers; bfloat16 makes ties at the borders of top-k and top-p.

    Which of equal logits top-p cuts is arbitrary in transformers (its sort is not stable): the same number stays.
    """
    generator = torch.Generator().manual_seed(vocab)
    for params in COMBINATIONS:
        for scale in (0.5, 4.0):
            logits = (scale * torch.randn(vocab, generator=generator)).to(dtype)
            expected = warped(logits if dtype == torch.float64 else logits.float(), params)
            probs = sampling_probs(logits, params)
            assert probs.dtype == expected.dtype
            kept = probs > 0
            assert torch.equal(logits[kept].sort().values, logits[expected > 0].sort().values), params
            assert params.top_p < 1 or torch.equal(kept, expected > 0), params
            same = kept == (expected > 0)
            torch.testing.assert_close(probs[same], expected[same], rtol=1e-5, atol=1e-9)


def test_excluded_tokens_stay_excluded() -> None:
    logits = torch.tensor([1.0, -math.inf, 0.5, -math.inf, 0.5])
    for params in COMBINATIONS:
        torch.testing.assert_close(sampling_probs(logits, params), warped(logits, params))
    assert sampling_probs(logits, SamplingParams(top_k=4))[[1, 3]].tolist() == [0, 0]


def test_greedy_takes_the_first_of_equal_largest_logits() -> None:
    """Guards another tie rule than argmax has: in bfloat16 the largest logits often tie."""
    logits = torch.tensor([0.0, 2.0, -1.0, 2.0, 2.0])
    assert sampling_probs(logits, GREEDY).tolist() == [0, 1, 0, 0, 0]
    many = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).mul(2).round().bfloat16()
    for each in many:
        best = at_nodes(WarperTransform(GREEDY), each.expand(6, -1)).best(0)
        assert best == int(each.argmax()) == int(sampling_probs(each, GREEDY).argmax())


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        SamplingParams(**values)


class InPlaceBan:
    """A processor that writes into the scores it is given."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids[0, -1]] = -math.inf
        return scores


PROCESSORS: dict[str, list[Any]] = {
    "repetition penalty": [RepetitionPenaltyLogitsProcessor(1.6)],
    "repetition penalty of the new text": [RepetitionPenaltyLogitsProcessor(1.6, prompt_ignore_length=3)],
    "no repeated bigram": [NoRepeatNGramLogitsProcessor(2)],
    "minimum length": [MinNewTokensLengthLogitsProcessor(4, 2, 5, device="cpu")],
    "suppressed": [SuppressTokensLogitsProcessor([0, 5], device="cpu")],
    "in place": [InPlaceBan()],
    "all": [
        RepetitionPenaltyLogitsProcessor(1.3),
        NoRepeatNGramLogitsProcessor(3),
        SuppressTokensLogitsProcessor([0], device="cpu"),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(4),
        InPlaceBan(),
    ],
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("padding", [{}, {0: [PADDING, PADDING]}], ids=["alone", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_processors_see_each_node_as_generate_would(
    name: str, padding: dict[int, list[int]], dtype: torch.dtype
) -> None:
    """Guards histories without the path, with siblings or without padding; asked in any order and twice."""
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = logits.clone()
    probs = at_nodes(ProcessorTransform(PROCESSORS[name], SamplingParams(), padding), logits)
    best = at_nodes(ProcessorTransform(PROCESSORS[name], GREEDY, padding), logits)
    for node in (5, 0, 3, 5, 1, 2, 4, 0):
        history = torch.tensor([[*padding.get(0, []), 3, 1, 2, 4, *TREE.path_tokens(node)]])
        scores = raw[node].double() if dtype == torch.float64 else raw[node].float()
        expected = LogitsProcessorList(PROCESSORS[name])(history, scores.clone()[None])[0]
        assert torch.equal(probs.probs(node), expected.softmax(-1))
        assert best.best(node) == int(expected.argmax())
        assert int(best.probs(node).argmax()) == int(expected.argmax())
    assert torch.equal(logits, raw), "a processor wrote into the target's raw logits"


def test_a_prompt_length_for_each_row_is_that_of_the_row() -> None:
    """Guards batches: generate() gives the penalty one ignored length for each row."""
    processor = RepetitionPenaltyLogitsProcessor(3.0)
    processor.prompt_ignore_length = torch.tensor([0, 3])
    logits = torch.ones(1, 8)
    logits_transform = ProcessorTransform([processor], SamplingParams())
    for key, ignored in ((0, 0), (1, 3)):
        probs = logits_transform.target_probs(Row(key, [3, 1, 2, 4], 9), TokenTree.root(4), Scores(logits)).probs(0)
        punished = set((probs < probs.max()).nonzero().flatten().tolist())
        assert punished == set([3, 1, 2, 4][ignored:])
    assert processor.prompt_ignore_length.tolist() == [0, 3]


@pytest.mark.parametrize("length", [5_000, 50_000])
def test_showing_a_long_history_costs_no_loop_over_its_tokens(length: int) -> None:
    """Guards a list of the whole text made into a tensor for each node: 5 ms at 32k tokens."""
    history, shown = Row(0, list(range(length)), 2 * length), Histories({0: [PADDING]})
    assert shown.ids(history, len(history.tokens), [7], torch.device("cpu")).tolist() == [[PADDING, *range(length), 7]]
    history.tokens.append(1)
    kept = shown.ids(history, len(history.tokens), [], torch.device("cpu"))
    seconds = []
    for token in range(20):
        started = time.perf_counter()
        ids = shown.ids(history, len(history.tokens), [token, 2], torch.device("cpu"))
        seconds.append(time.perf_counter() - started)
        assert ids[0, -3:].tolist() == [1, token, 2]
    assert min(seconds) < 1e-3
    ids.zero_()
    assert kept.tolist() == [[PADDING, *range(length), 1]], "what was shown is the caller's own"
    other = Row(0, [5, 6], 9)
    assert shown.ids(other, len(other.tokens), [], torch.device("cpu")).tolist() == [[PADDING, 5, 6]], (
        "another row of the same key"
    )


class Identity:
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    "params",
    [GREEDY, *(SamplingParams(*values) for values in itertools.product((1.0, 0.5), (0, 1, 2), (1.0, 0.5), (0.0, 0.3)))],
    ids=str,
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("must_wait", [False, True], ids=["node by node", "all nodes at once"])
@pytest.mark.parametrize("processors", [None, [Identity()]], ids=["fast", "processors"])
def test_logits_that_are_not_finite_are_an_error_that_names_the_position(
    params: SamplingParams,
    bad: float,
    processors: list[Any] | None,
    must_wait: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards text made of NaN. One NaN or +inf is enough, wherever it stands; -inf must be everywhere."""
    monkeypatch.setattr(specdec.distributions, "_must_wait", lambda _: must_wait)
    logits_transform: LogitsTransform = (
        WarperTransform(params) if processors is None else ProcessorTransform(processors, params)
    )
    everywhere, anywhere = list(range(6)), [[0], [1], [5]]
    for where in [everywhere] if bad == -math.inf else [*anywhere, everywhere]:
        logits = torch.arange(6.0).repeat(6, 1)
        logits[3, where] = bad
        probs = at_nodes(logits_transform, logits)
        with pytest.raises(NonFiniteLogitsError, match="position 6 of row 0"):
            probs.probs(3)
        if params.is_greedy:
            with pytest.raises(NonFiniteLogitsError, match="position 6 of row 0"):
                probs.best(3)
        assert math.isclose(float(probs.probs(4).sum()), 1, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_nodes_at_once_are_the_nodes_one_by_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a greedy step waits once. Of equal scores any is right; float64 tells neighbours of float32 apart."""
    logits = torch.randn(6, 5000, dtype=torch.float64)
    logits[2, 4000] = 9.0
    logits[2, 17] = 9.0 + 1e-12
    logits = logits.to(dtype)
    one_by_one = [at_nodes(WarperTransform(GREEDY), logits).best(node) for node in range(6)]
    monkeypatch.setattr(specdec.distributions, "_must_wait", lambda _: True)
    probs = at_nodes(WarperTransform(GREEDY), logits)
    at_once = [probs.best(node) for node in range(6)]
    assert [float(logits[i, t]) for i, t in enumerate(at_once)] == [
        float(logits[i, t]) for i, t in enumerate(one_by_one)
    ]
    assert dtype is not torch.float64 or at_once[2] == 17


def test_a_processor_that_excludes_every_token_is_an_error() -> None:
    logits_transform = ProcessorTransform([SuppressTokensLogitsProcessor(range(6), device="cpu")], SamplingParams())
    with pytest.raises(NonFiniteLogitsError, match="every token is excluded"):
        at_nodes(logits_transform, torch.zeros(6, 6)).probs(0)
