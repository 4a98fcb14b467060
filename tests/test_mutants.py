"""The proof proves something: verifiers that are wrong on purpose fail it, and so does our own code with one line changed."""

from __future__ import annotations

import pytest
from chance import TwinNoise, g_test
from enumeration import Loop, NoiseReuseError, exact_joint, sample_many, stepwise_joint, total_variation
from mutants import (
    LYING_TOP_K,
    CopiedRejection,
    EdgeNoise,
    EmitsByDraftNoise,
    EmitsFromTarget,
    EndsTextOnNan,
    JudgesByDraftNoise,
    KeepsDraftProbs,
    LeavesDraftProbsUnscaled,
    LeavesResidualUnscaled,
    PrunesSiblings,
    RefusingNoise,
    SharesCoin,
    SortsSiblings,
    TakesAbsoluteResidual,
    TakesBonusFromParent,
    mutated,
)
from test_exactness import CASES, TOLERANCE, Case, agreeing, assert_possible
from toy import (
    CERTAIN,
    INDEPENDENT,
    PROMPT,
    UNBALANCED,
    WITHOUT_REPLACEMENT,
    Kind,
    Shape,
    ToyDrafter,
    ToyTarget,
    chain,
    full,
)

from specdec import noise as noise_module
from specdec.interfaces import Verifier
from specdec.verifiers import match, rejection, walk
from specdec.verifiers.rejection import RejectionVerifier

PAIR = full(2)
FOUND = 1e-3  # a mutant must be further from the target than this


def error(verifier: Verifier, kind: Kind, shape: Shape = PAIR, vocab: int = 4, *, strict: bool = True) -> float:
    """Total variation between three tokens of the loop and the target's."""
    loop = Loop(ToyDrafter(kind, shape, vocab), verifier, ToyTarget(3, vocab))
    return total_variation(stepwise_joint(loop, 3, strict=strict), exact_joint(loop.target, PROMPT, 3))


@pytest.mark.parametrize("kind", [INDEPENDENT, WITHOUT_REPLACEMENT], ids=lambda kind: kind.draw.value)
@pytest.mark.parametrize("shape", [chain(2), full(2), full(3), UNBALANCED], ids=str)
def test_the_copy_that_mutants_differ_from_is_exact(kind: Kind, shape: Shape) -> None:
    """Guards the mutants: each must fail for what it changes and not for how it was copied."""
    assert error(CopiedRejection(), kind, shape) <= TOLERANCE


@pytest.mark.parametrize(
    ("mutant", "kind", "shape"),
    [
        (KeepsDraftProbs(), WITHOUT_REPLACEMENT, full(2)),
        (LeavesDraftProbsUnscaled(), WITHOUT_REPLACEMENT, full(3)),
        (SortsSiblings(), WITHOUT_REPLACEMENT, full(2)),
        (PrunesSiblings(), WITHOUT_REPLACEMENT, full(2)),
        (EmitsFromTarget(), INDEPENDENT, chain(2)),
        (LeavesResidualUnscaled(), INDEPENDENT, full(2)),
        (TakesAbsoluteResidual(), INDEPENDENT, chain(2)),
        (TakesBonusFromParent(), INDEPENDENT, chain(2)),
        (CopiedRejection(), LYING_TOP_K, full(2)),
        (RejectionVerifier(), LYING_TOP_K, full(2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, CopiedRejection | RejectionVerifier) else "",
)
def test_enumeration_finds_verifiers_that_are_wrong(mutant: Verifier, kind: Kind, shape: Shape) -> None:
    """Mistakes of published code; LYING_TOP_K is a drafter that declares its top k as drawn from q."""
    assert error(mutant, kind, shape) > FOUND


def test_enumeration_finds_a_coin_shared_by_siblings() -> None:
    """Reseeding in the loop: refused as reuse, and biased if the reuse is let through."""
    with pytest.raises(NoiseReuseError):
        error(SharesCoin(), INDEPENDENT)
    assert error(SharesCoin(), INDEPENDENT, strict=False) > FOUND


@pytest.mark.parametrize("mutant", [JudgesByDraftNoise(), EmitsByDraftNoise()], ids=lambda m: type(m).__name__)
def test_statistics_find_draft_noise_used_again(mutant: Verifier) -> None:
    """Reseeding between draft and verification. The right verifier passes the same test; false alarm odds 1e-6."""
    with pytest.raises(NoiseReuseError):
        error(mutant, INDEPENDENT)
    for verifier, is_right in ((CopiedRejection(), True), (mutant, False)):
        loop = Loop(ToyDrafter(INDEPENDENT, chain(2), 4), verifier, ToyTarget(1, 4))
        fit = g_test(sample_many(loop, TwinNoise(98), 3, 6000), exact_joint(loop.target, PROMPT, 3))
        assert (fit > 1e-6) == is_right


def test_ending_the_text_on_nan_is_found() -> None:
    """A rejection by rounding leaves 0 / 0: the mutant then emits an end of text that the target cannot emit."""
    case = Case(INDEPENDENT, chain(1))
    assert_possible(Loop(agreeing(case), CopiedRejection()), RefusingNoise)
    with pytest.raises(AssertionError):
        assert_possible(Loop(agreeing(case), EndsTextOnNan()), RefusingNoise)


COIN = "noise.coin(mass / float(draft_probs[token]), depth, order)"
RESIDUAL = "(residual - draft_probs).clamp(min=0)"
SCALED = "return mass / total if bool(total > 0) else torch.clone(before)"
CHECK = ("check_draw(self, tree)", "pass")

REJECTION_MUTATIONS = {
    "no subtraction in the residual": (RESIDUAL, "residual"),
    "residual not clamped but folded": (RESIDUAL, "(residual - draft_probs).abs()"),
    "residual the wrong way round": (RESIDUAL, "(draft_probs - residual).clamp(min=0)"),
    "residual not normalised": (SCALED, "return mass"),
    "q keeps the rejected token": ("draft_probs = _without(draft_probs, token)", "pass"),
    "q of the first sibling for all": (" or tree.draw is Draw.INDEPENDENT:", ":"),
    "q of another node": ("tree.draft_probs[tree.sources[child]]", "tree.draft_probs[0]"),
    "children in reverse": ("enumerate(children)", "enumerate(children[::-1])"),
    "one coin for all siblings": (COIN, COIN.replace(", order", "")),
    "one coin for all depths": (COIN, COIN.replace("depth", "0")),
    "accepts with p and not p / q": (COIN, "noise.coin(mass, depth, order)"),
    "a certain child stays after its rejection": ("residual = _without(residual, token)", "pass"),
    "emits from the target": ("noise.draw(residual,", "noise.draw(target.probs(nodes[-1]),"),
}


def fails(verifier: Verifier) -> bool:
    """Whether some case of the exactness proof rejects the verifier, among those it declares."""
    for case in CASES.values():
        if case.kind.draw in RejectionVerifier().draws and case.shape != full(2, 2):
            try:
                if error(verifier, case.kind, case.shape, vocab=3) > FOUND:
                    return True
            except (AssertionError, ZeroDivisionError):  # noise used twice, or nothing left to draw from
                return True
    return False


@pytest.mark.parametrize("name", REJECTION_MUTATIONS)
def test_each_line_of_rejection_matters(name: str) -> None:
    """Guards the proof itself: a change that it would not notice is a hole in it."""
    assert fails(mutated(rejection, *REJECTION_MUTATIONS[name]).RejectionVerifier())


def test_our_rejection_passes_the_same_judge() -> None:
    assert not fails(RejectionVerifier())


def test_a_verifier_that_refuses_nothing_is_wrong_on_what_it_should_refuse() -> None:
    """The declared draws are not over-careful: rejection on a top-plus-one tree is really biased."""
    verifier = mutated(rejection, *CHECK).RejectionVerifier()
    assert error(verifier, CASES["top plus one <2>"].kind) > FOUND


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("token = pick(nodes[-1], len(tokens))", "token = pick(nodes[0], len(tokens))"),
        ("tokens.append(token)", "tokens.append(tree.tokens[(children[nodes[-1]] or [0])[0]])"),
        ("if tree.tokens[c] == token", "if tree.tokens[c] >= token"),
    ],
    ids=["asks the root again", "emits the draft", "moves to another child"],
)
def test_each_line_of_the_shared_walk_matters(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for the walk of sample-and-match."""
    monkeypatch.setattr(match, "follow", mutated(walk, old, new).follow)
    assert max(error(match.MatchVerifier(), kind, UNBALANCED) for kind in (CERTAIN, INDEPENDENT)) > FOUND


@pytest.mark.parametrize("kind", [INDEPENDENT, WITHOUT_REPLACEMENT], ids=lambda kind: kind.draw.value)
def test_accepting_on_a_coin_of_at_most_p_is_found(kind: Kind) -> None:
    """``<`` made ``<=`` in specdec/noise.py accepts tokens of probability 0 when the uniform number is 0."""
    mutant = mutated(noise_module, "return float(uniform) < prob", "return float(uniform) <= prob")
    loop = Loop(Case(kind, full(2)).drafter(), RejectionVerifier())
    assert_possible(loop, EdgeNoise)
    with pytest.raises(AssertionError):
        assert_possible(loop, lambda draws: EdgeNoise(draws, mutant.PhiloxRowNoise))
