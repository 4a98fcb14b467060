"""Losslessness, proved by enumeration: every branch of the decode loop's randomness, for every drafter and verifier.

A new verifier is covered by being in ``specdec.verifiers.VERIFIERS``; a new way to draft by one line in ``exact_cases.CASES``.
Tolerance 1e-12: there are no statistics here, only rounding of float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from chance import TwinNoise, g_test
from enumeration import Law, Loop, exact_joint, product, sample_many, stepwise_joint, total_variation, whole_joint
from exact_cases import CASES, SMALL, TOLERANCE, Case, agreeing, assert_possible, greedy_law, is_exact
from mutants import EdgeNoise, RefusingNoise
from torch import Tensor
from toy import COUPLED, GROUP_AROUND, PROMPT, ToyDrafter, ToyTarget, chain, full
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.decode import Decoder
from specdec.distributions import ProcessorTransform, WarperTransform
from specdec.drafters.none import NoDrafter
from specdec.errors import InexactDraftError
from specdec.interfaces import Drafter, Limit, Row
from specdec.rng import PhiloxRng, Rng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import VERIFIERS, make_verifier


def every_exact_pair(cases: dict[str, Case], without: str = "") -> pytest.MarkDecorator:
    verifiers = [name for name in VERIFIERS if name != without]
    pairs = [(case, verifier) for case in cases for verifier in verifiers if is_exact(verifier, cases[case])]
    return pytest.mark.parametrize(
        ("case", "verifier"),
        [(cases[case], verifier) for case, verifier in pairs],
        ids=[f"{case}-{verifier}" for case, verifier in pairs],
    )


def every_refused_pair() -> pytest.MarkDecorator:
    pairs = [
        (case, verifier)
        for case in CASES
        for verifier in VERIFIERS
        if make_verifier(verifier).lossless and not is_exact(verifier, CASES[case])
    ]
    return pytest.mark.parametrize(("case", "verifier"), pairs)


def warped(params: SamplingParams) -> Law:
    """transformers' own warpers, in the order of generate()."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return lambda logits, history: warpers(torch.tensor([list(history)]), logits[None])[0].softmax(-1)


class FadingPenalty:
    """A path-dependent processor: the longer ago a token stood, the less it is held against it. Writes in place."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        history = input_ids[0].tolist()
        for age, token in enumerate(reversed(history)):
            scores[0, token] -= 2.0 * 0.7**age
        if history[-2:] == [1, 1]:
            scores[0, 1] = -torch.inf
        return scores


def penalised(logits: Tensor, history: Sequence[int]) -> Tensor:
    bans = [-torch.inf if token == 1 and tuple(history[-2:]) == (1, 1) else 0.0 for token in range(len(logits))]
    weight = [
        sum(2.0 * 0.7**age for age, t in enumerate(reversed(history)) if t == token) for token in range(len(logits))
    ]
    return (logits - torch.tensor(weight, dtype=torch.float64) + torch.tensor(bans, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize(("num_tokens", "seed"), [(3, 2), (4, 1)])
@every_exact_pair(CASES)
def test_the_joint_distribution_of_several_tokens_is_the_targets(
    case: Case, verifier: str, num_tokens: int, seed: int
) -> None:
    """Guards every rule of docs/verification.md; the joint, because a marginal can be right while the joint is not."""
    loop = Loop(case.drafter(), make_verifier(verifier), ToyTarget(seed))
    assert total_variation(stepwise_joint(loop, num_tokens), exact_joint(loop.target, PROMPT, num_tokens)) <= TOLERANCE


@every_exact_pair({name: case for name, case in CASES.items() if name.endswith(("<3>", "chain"))})
def test_it_is_so_with_four_tokens_to_choose_from(case: Case, verifier: str) -> None:
    """Guards third siblings that still have a choice: of three tokens the third one has none."""
    loop = Loop(case.drafter(vocab=4), make_verifier(verifier), ToyTarget(3, vocab=4))
    assert total_variation(stepwise_joint(loop, 3), exact_joint(loop.target, PROMPT, 3)) <= TOLERANCE


@every_exact_pair(SMALL)
def test_whole_runs_of_the_loop_give_the_same_as_step_by_step(case: Case, verifier: str) -> None:
    """Guards the shortcut of the other tests, and noise that is used in one step and again in a later one."""
    loop = Loop(case.drafter(), make_verifier(verifier))
    whole = whole_joint(loop, 3)
    assert total_variation(whole, exact_joint(loop.target, PROMPT, 3)) <= TOLERANCE
    assert total_variation(whole, stepwise_joint(loop, 3)) <= TOLERANCE


def test_plain_decoding_is_exact() -> None:
    for name in VERIFIERS:
        loop = Loop(NoDrafter(), make_verifier(name))
        assert total_variation(whole_joint(loop, 4), exact_joint(loop.target, PROMPT, 4)) <= TOLERANCE


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.3),
        SamplingParams(temperature=1.5, top_k=2, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
@every_exact_pair(SMALL)
def test_it_is_so_under_temperature_top_k_top_p_and_min_p(case: Case, verifier: str, params: SamplingParams) -> None:
    """Guards warpers applied to the draft only, or to the residual: the warped target is the one to keep."""
    loop = Loop(case.drafter(), make_verifier(verifier), logits_transform=WarperTransform(params))
    assert total_variation(stepwise_joint(loop, 3), exact_joint(loop.target, PROMPT, 3, warped(params))) <= TOLERANCE


@every_exact_pair(CASES)
def test_greedy_decoding_is_the_argmax_walk(case: Case, verifier: str) -> None:
    """Guards a temperature of 0 that still flips a coin. The draft may be random; the text may not."""
    loop = Loop(case.drafter(), make_verifier(verifier), logits_transform=WarperTransform(GREEDY))
    joint = stepwise_joint(loop, 4)
    assert len(joint) == 1
    assert total_variation(joint, exact_joint(loop.target, PROMPT, 4, greedy_law)) <= TOLERANCE


@every_exact_pair(SMALL)
def test_a_processor_sees_the_path_that_leads_to_its_node(case: Case, verifier: str) -> None:
    """Guards penalties that see the row without the accepted drafts, or with those of a sibling."""
    loop = Loop(
        case.drafter(),
        make_verifier(verifier),
        logits_transform=ProcessorTransform([FadingPenalty()], SamplingParams()),
    )
    assert total_variation(stepwise_joint(loop, 4), exact_joint(loop.target, PROMPT, 4, penalised)) <= TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 2, 4])
@every_exact_pair(SMALL)
def test_an_early_stop_cuts_the_text_and_changes_nothing_before(case: Case, verifier: str, num_tokens: int) -> None:
    """Guards tokens accepted behind the end of the text, and limits that bias what stands before them."""
    loop = Loop(case.drafter(), make_verifier(verifier), stop_token=2)
    assert (
        total_variation(stepwise_joint(loop, num_tokens), exact_joint(loop.target, PROMPT, num_tokens, stop_token=2))
        <= TOLERANCE
    )


@every_exact_pair(SMALL)
def test_rows_of_one_batch_are_independent(case: Case, verifier: str) -> None:
    """Guards rows that read each other's noise or tree: one row ends before the other."""
    loop = Loop(case.drafter(), make_verifier(verifier))
    prompts = (PROMPT, (2, 2, 1))
    joint = stepwise_joint(loop, [1, 3], prompts)
    expected = product(exact_joint(loop.target, prompts[0], 1), exact_joint(loop.target, prompts[1], 3))
    assert total_variation(joint, expected) <= TOLERANCE


@every_refused_pair()
def test_a_verifier_refuses_trees_that_it_is_not_exact_for(case: str, verifier: str) -> None:
    """Guards silent bias: most wrong pairings accept more than the right ones, so nobody would notice."""
    with pytest.raises(InexactDraftError, match=verifier):
        Loop(CASES[case].drafter(), make_verifier(verifier)).generate(PhiloxRng(0), 4)


@pytest.mark.parametrize("max_nodes", [1, 3])
@every_exact_pair({name: case for name, case in CASES.items() if name.endswith(("<3>", "<2,2>", "uneven"))}, "match")
def test_a_limit_of_nodes_changes_nothing(case: Case, verifier: str, max_nodes: int) -> None:
    """Guards trees that are cut, so that nodes of one level have different numbers of children."""
    loop = Loop(case.drafter(), make_verifier(verifier), max_nodes=max_nodes)
    assert total_variation(stepwise_joint(loop, 3), exact_joint(loop.target, PROMPT, 3)) <= TOLERANCE


@every_exact_pair(SMALL)
def test_a_token_of_probability_zero_is_never_emitted_even_if_the_coin_is_zero(case: Case, verifier: str) -> None:
    """Guards accepting on ``coin <= p``."""
    assert_possible(Loop(case.drafter(), make_verifier(verifier)), EdgeNoise)


@every_exact_pair(SMALL)
def test_a_rejection_by_rounding_still_emits_what_the_target_can_emit(case: Case, verifier: str) -> None:
    """Guards a residual of 0 / 0, taken for the end of the text: draft and target agree, and every coin says no."""
    loop = Loop(agreeing(case), make_verifier(verifier))
    assert_possible(loop, RefusingNoise)


def generate_batch(drafter: Drafter, rng: Rng, keys: Sequence[int], max_rows: int | None) -> list[list[int]]:
    prompts = {0: [0, 1], 1: [2, 2, 1], 2: [1, 0], 3: [0, 0, 0, 2]}
    rows = [Row(key, list(prompts[key]), len(prompts[key]) + 5 + key) for key in keys]
    logits_transform = WarperTransform(SamplingParams())
    decoder = Decoder(
        ToyTarget(), drafter, make_verifier("match"), logits_transform, rng, lambda row: row.tokens[-3:] == [0, 1, 0]
    )
    for _ in decoder.run(rows, max_rows):
        pass
    return [row.tokens for row in rows]


@pytest.mark.parametrize("case", [*CASES.values(), Case(COUPLED, chain(3))], ids=[*CASES, "coupled chain"])
def test_sample_and_match_is_token_identical_to_plain_decoding(case: Case) -> None:
    """Guards noise that depends on the drafter, the tree, the batch or the order of calls. Nothing is left to chance."""
    for seed in range(5):
        rng = PhiloxRng(seed * 0x9E3779B97F4A7C15 % 2**64)
        plain = [generate_batch(NoDrafter(), rng, [key], None)[0] for key in range(4)]
        assert generate_batch(case.drafter(), rng, [0, 1, 2, 3], 2) == plain
        assert generate_batch(case.drafter(), rng, [3, 1], None) == [plain[3], plain[1]]


@every_exact_pair({**SMALL, "group around certain <3>": Case(GROUP_AROUND, full(3))}, without="match")
def test_many_runs_with_counter_based_noise_fit_the_target(case: Case, verifier: str) -> None:
    """Guards what enumeration cannot: noise that is used twice. G-test; false alarm odds 1e-6 (the seed is fixed).

    TwinNoise is PhiloxRng number for number (test_noise.py), only faster at this size.
    """
    loop = Loop(case.drafter(), make_verifier(verifier))
    observed = sample_many(loop, TwinNoise(2024), 3, 2000)
    assert g_test(observed, exact_joint(loop.target, PROMPT, 3)) > 1e-6


@pytest.mark.slow
def test_many_runs_of_plain_decoding_fit_the_target() -> None:
    """And so do all of sample-and-match, being token-identical to it. G-test; false alarm odds 1e-6."""
    loop = Loop(NoDrafter(), make_verifier("match"))
    assert g_test(sample_many(loop, TwinNoise(2024), 3, 10_000), exact_joint(loop.target, PROMPT, 3)) > 1e-6


def test_a_drafter_that_shares_the_noise_is_matched_as_often_as_the_theory_says() -> None:
    """Drafter-invariant coupling: at least (1 - TV) / (1 + TV) of first drafts match. Slack 5 sigma: odds 3e-7."""
    drafter, target, num_rows = ToyDrafter(COUPLED, chain(1)), ToyTarget(), 2000
    rows = [Row(key, list(PROMPT), len(PROMPT) + 2) for key in range(num_rows)]
    decoder = Loop(drafter, make_verifier("match"), target).decoder(TwinNoise(7))
    matched = sum(e.step.num_accepted for e in decoder.run(rows) if e.step.index == 0) / num_rows
    distance = 0.5 * float((drafter.tables[0][1] - target.logits[1].softmax(-1)).abs().sum())
    bound = (1 - distance) / (1 + distance)
    assert matched >= bound - 5 * (bound * (1 - bound) / num_rows) ** 0.5


def test_independent_siblings_are_sometimes_equal() -> None:
    """Guards the doubles: without duplicates the proof would not cover them."""
    rng, rows = PhiloxRng(5), [Row(key, list(PROMPT), 9) for key in range(20)]
    drafter = CASES["independent <3>"].drafter()
    drafter.begin(rows)
    trees: list[TokenTree] = drafter.propose(rows, [Limit(3, 16)] * 20, SamplingParams(), rng)
    assert all(len(tree) == 4 for tree in trees)
    assert any(len(set(tree.tokens[1:])) < 3 for tree in trees)
