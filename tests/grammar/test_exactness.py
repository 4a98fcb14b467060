"""Constrained output follows the target's distribution restricted to the grammar at every token: by enumeration.

Tolerance 1e-12. The law is that of plain constrained decoding with a fresh state at every token; the states are those of
a toy backend that is a list of words, and of llguidance on the same tokens.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import growing
import pytest
import torch
from enumeration import exact_joint, product, softmax_law, stepwise_joint, total_variation, whole_joint
from exact_cases import CASES as ALL_CASES
from exact_cases import SMALL, TOLERANCE, Case, greedy_law, is_exact
from growing import SHAPES, GrowingDrafter
from mutants import mutated
from torch import Tensor
from toy import PROMPT
from toy_grammar import END, REGEXES, TEXTS, loop, masked_law, start, toy_drafter

from specdec.distributions import ProcessorTransform
from specdec.drafters.grammar import GrammarDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees import growth
from specdec.drafters.trees.growth import ChildSampling
from specdec.grammar.masks import GrammarProcessor, GrammarTransform
from specdec.grammar.row import RowGrammar
from specdec.grammar.trees import pruned
from specdec.interfaces import Drafter, Limit, Row, Verifier
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY, SamplingParams, sampling_probs
from specdec.verifiers import VERIFIERS, make_verifier

CASES = ("certain unbalanced", "independent chain", "without replacement unbalanced", "top plus one <2>")
PAIRS = [(case, name) for case in CASES for name in VERIFIERS if is_exact(name, SMALL[case])]
each_pair = pytest.mark.parametrize(
    ("case", "verifier"), [(SMALL[case], name) for case, name in PAIRS], ids=[f"{case}-{name}" for case, name in PAIRS]
)
each_grammar = pytest.mark.parametrize(
    ("pattern", "backend"), [*((pattern, "words") for pattern in REGEXES[:3]), (REGEXES[0], "llguidance")]
)


def guided(drafter: Drafter, verifier: Verifier, is_growing: bool = True) -> GrammarDrafter:
    return GrammarDrafter(drafter, verifier.shares_target_noise, is_growing)


@each_grammar
@each_pair
def test_the_joint_distribution_is_that_of_plain_constrained_decoding(
    case: Case, verifier: str, pattern: str, backend: str
) -> None:
    """Guards masks at nodes, what is cut off trees and what is grown; drawn nodes, and all verifiers."""
    begin, rule = partial(start(pattern, backend).fork), make_verifier(verifier)
    runs = loop(guided(toy_drafter(case), rule), rule, begin)
    expected = exact_joint(runs.target, PROMPT, 3, masked_law(begin, softmax_law), stop_token=END)
    assert total_variation(stepwise_joint(runs, 3), expected) <= TOLERANCE


@pytest.mark.parametrize("verifier", ["match", "rejection"])
@pytest.mark.parametrize("pattern", REGEXES)
@pytest.mark.parametrize("drafter", ["none", "unmasked", "masked", "forced"])
def test_it_is_so_for_whole_runs_whatever_the_drafter_knows_of_the_grammar(
    drafter: str, pattern: str, verifier: str
) -> None:
    """Guards a state that lives over steps, in one row from its first token to its last."""
    begin, rule = partial(start(pattern, "llguidance").fork), make_verifier(verifier)
    drafters: dict[str, Drafter] = {
        "none": NoDrafter(),
        "unmasked": toy_drafter(SMALL["certain unbalanced"]),
        "masked": guided(toy_drafter(SMALL["certain chain"]), rule, is_growing=False),
        "forced": guided(NoDrafter(), rule),
    }
    runs = loop(drafters[drafter], rule, begin)
    expected = exact_joint(runs.target, PROMPT, 4, masked_law(begin, softmax_law), stop_token=END)
    assert total_variation(whole_joint(runs, 4), expected) <= TOLERANCE


@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_it_is_so_in_a_batch(verifier: str) -> None:
    begin, rule = partial(start(REGEXES[0], "llguidance").fork), make_verifier(verifier)
    runs = loop(guided(toy_drafter(SMALL["independent chain"]), rule), rule, begin)
    law = masked_law(begin, softmax_law)
    one = [exact_joint(runs.target, prompt, 2, law, stop_token=END) for prompt in (PROMPT, (2, 0))]
    joint = stepwise_joint(runs, 2, (PROMPT, (2, 0)))
    assert total_variation(joint, product(*one)) <= TOLERANCE


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(0.7, top_k=2), SamplingParams(1.5, top_p=0.8, min_p=0.1)], ids=str
)
@pytest.mark.parametrize("pattern", REGEXES[::3])
@pytest.mark.parametrize("verifier", ["match", "rejection", "block", "traversal"])
def test_the_mask_comes_before_temperature_and_filters(verifier: str, pattern: str, params: SamplingParams) -> None:
    """top-k of all tokens and then the mask would leave fewer than k, or none."""
    begin, rule = partial(start(pattern).fork), make_verifier(verifier)
    runs = loop(guided(toy_drafter(SMALL["independent chain"]), rule), rule, begin, transform=GrammarTransform(params))
    then = greedy_law if params.is_greedy else lambda logits, _: sampling_probs(logits, params)
    expected = exact_joint(runs.target, PROMPT, 3, masked_law(begin, then), stop_token=END)
    assert total_variation(stepwise_joint(runs, 3), expected) <= TOLERANCE


class FadingPenalty:
    """Depends on the path and writes in place."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for age, token in enumerate(reversed(input_ids[0].tolist())):
            scores[0, token] -= 2.0 * 0.7**age
        return scores


@pytest.mark.parametrize("verifier", ["match", "rejection", "traversal"])
def test_it_is_so_among_other_processors(verifier: str) -> None:
    begin, rule = partial(start(REGEXES[0]).fork), make_verifier(verifier)
    penalty = FadingPenalty()
    processors = [penalty, GrammarProcessor([begin()], (END,)), lambda _, scores: scores / 0.7]
    transform = ProcessorTransform(processors, SamplingParams(0.7))
    runs = loop(guided(toy_drafter(SMALL["certain unbalanced"]), rule), rule, begin, transform=transform)

    def law(logits: Tensor, history: tuple[int, ...]) -> Tensor:
        state = begin()
        assert all(state.accept(token) for token in history[2:])
        scores = penalty(torch.tensor([history]), logits[None].clone())[0]
        return (scores.masked_fill(~state.allowed(), -torch.inf) / 0.7).softmax(-1)

    assert (
        total_variation(stepwise_joint(runs, 3), exact_joint(runs.target, PROMPT, 3, law, stop_token=END)) <= TOLERANCE
    )


@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
@pytest.mark.parametrize(
    ("case", "max_nodes", "num_tokens"), [("independent unbalanced", 4, 4), ("independent <2>", 3, 3)]
)
def test_it_is_so_where_drawn_nodes_decide_how_much_room_forced_ones_get(
    case: str, max_nodes: int, num_tokens: int, verifier: str
) -> None:
    """One forced node fits, below the elder child or the younger one, as their draws decide."""
    begin, rule = partial(start(REGEXES[0]).fork), make_verifier(verifier)
    runs = replace(loop(guided(toy_drafter((ALL_CASES | SMALL)[case]), rule), rule, begin), max_nodes=max_nodes)
    expected = exact_joint(runs.target, PROMPT, num_tokens, masked_law(begin, softmax_law), stop_token=END)
    assert total_variation(stepwise_joint(runs, num_tokens), expected) <= TOLERANCE


GROWN = [
    (children, shape, name)
    for children, shape in (("independent", "chain"), ("independent", "2x1"), ("without_replacement", "2x1"),
                            ("top_plus_one", "2x1"), ("certain", "best-first"), ("without_replacement", "unsure chain"))
    for name in ("match", "rejection", "traversal")
]  # fmt: skip


@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize(("children", "shape", "verifier"), GROWN)
def test_it_is_so_where_a_draft_model_is_masked(children: str, shape: str, verifier: str, is_guided: bool) -> None:
    """Guards draft distributions that are declared without the mask that they were drawn under."""
    begin, rule = partial(start(REGEXES[0]).fork), make_verifier(verifier)
    drafter: Drafter = GrowingDrafter(ChildSampling(children), SHAPES[shape], vocab=4)
    runs = loop(guided(drafter, rule) if is_guided else drafter, rule, begin)
    expected = exact_joint(runs.target, PROMPT, 3, masked_law(begin, softmax_law), stop_token=END)
    assert total_variation(stepwise_joint(runs, 3), expected) <= TOLERANCE


def test_that_finds_a_distribution_declared_without_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutated(growth, "self.draft_probs.append(probs)", "self.draft_probs.append(probs.clamp(min=0.2))")
    monkeypatch.setattr(growing, "TreeBuilder", wrong.TreeBuilder)
    begin, rule = partial(start(REGEXES[0]).fork), make_verifier("rejection")
    runs = loop(GrowingDrafter(ChildSampling.INDEPENDENT, SHAPES["chain"], vocab=4), rule, begin)
    expected = exact_joint(runs.target, PROMPT, 3, masked_law(begin, softmax_law), stop_token=END)
    assert total_variation(stepwise_joint(runs, 3), expected) > 1e-3


def test_a_masked_draft_model_is_excluded_nowhere() -> None:
    begin = partial(start(REGEXES[0]).fork)
    runs = loop(GrowingDrafter(ChildSampling.CERTAIN, SHAPES["3x2"], vocab=4), make_verifier("match"), begin)
    row = Row(0, list(PROMPT), 12)
    runs.target.open([row])
    (tree,) = runs.drafter.propose([row], [Limit(4, 12)], SamplingParams(), PhiloxRng(0))
    assert len(tree) > 3
    assert row.grammar is not None
    assert pruned(tree, row.grammar, row.tokens, drops_drawn=True) is tree


def test_a_grammar_may_be_attached_between_two_steps_of_a_row() -> None:
    """An engine that serves many requests gives each row its own, when it joins or later."""
    rule = make_verifier("match")
    runs = loop(guided(toy_drafter(SMALL["certain unbalanced"]), rule), rule, lambda: start("ab(a|b)?"))
    decoder = runs.decoder(PhiloxRng(3))
    free, bound = Row(0, list(PROMPT), 12), Row(1, list(PROMPT), 12)
    runs.target.open([free, bound])
    decoder.drafter.begin([free, bound])
    free.grammar = bound.grammar = None
    decoder.step([free, bound])
    num_before = len(bound.tokens)
    bound.grammar = RowGrammar(start("ab(a|b)?"), num_before)
    while bound.tokens[-1] != END or len(bound.tokens) == num_before:
        decoder.step([bound])
    text = "".join(TEXTS[token] for token in bound.tokens[num_before:])
    assert re.fullmatch("ab(a|b)?", text)
    assert bound.tokens[-1] == END
