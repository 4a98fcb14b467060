"""The proof proves something: verifiers that are wrong on purpose fail it, and so does our own code with one line changed."""

from __future__ import annotations

import pytest
from chance import TwinNoise, g_test
from enumeration import Loop, NoiseReuseError, exact_joint, sample_many, stepwise_joint, total_variation
from exact_cases import TOLERANCE, Case, agreeing, assert_possible
from mutants import (
    LYING_TOP_K,
    PEEKING,
    UNSCALED_PLUS_ONE,
    WHOLE_PLUS_ONE,
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
    TriesTopChildrenFirst,
    mutated,
)
from toy import (
    CERTAIN,
    CERTAIN_FIRST,
    GROUP_AROUND,
    INDEPENDENT,
    PROMPT,
    TOP_PLUS_ONE,
    UNBALANCED,
    UNEVEN,
    WITHOUT_REPLACEMENT,
    Kind,
    Shape,
    ToyDrafter,
    ToyTarget,
    chain,
    full,
)

from specdec import rng as noise_module
from specdec.interfaces import Verifier
from specdec.verifiers import block, make_verifier, match, rejection, traversal
from specdec.verifiers.common import residual, walk
from specdec.verifiers.rejection import RejectionVerifier

PAIR = full(2)
FOUND = 1e-3  # a mutant must be further from the target than this


def error(verifier: Verifier, kind: Kind, shape: Shape = PAIR, vocab: int = 4, *, strict: bool = True) -> float:
    """Total variation between three tokens of the loop and the target's."""
    loop = Loop(ToyDrafter(kind, shape, vocab), verifier, ToyTarget(3, vocab))
    return total_variation(stepwise_joint(loop, 3, strict=strict), exact_joint(loop.target, PROMPT, 3))


@pytest.mark.parametrize("kind", [INDEPENDENT, WITHOUT_REPLACEMENT, TOP_PLUS_ONE], ids=lambda kind: kind.name)
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
        (TriesTopChildrenFirst(), TOP_PLUS_ONE, full(2)),
        (TriesTopChildrenFirst(), TOP_PLUS_ONE, full(3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, CopiedRejection) else "",
)
def test_enumeration_finds_verifiers_that_are_wrong(mutant: Verifier, kind: Kind, shape: Shape) -> None:
    """Mistakes of published code."""
    assert error(mutant, kind, shape) > FOUND


@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
@pytest.mark.parametrize("kind", [LYING_TOP_K, WHOLE_PLUS_ONE, UNSCALED_PLUS_ONE, PEEKING], ids=lambda kind: kind.name)
def test_enumeration_finds_drafters_that_declare_what_is_not_so(kind: Kind, verifier: str) -> None:
    """The preconditions of docs/verification.md are needed. No verifier can see it; match does not care."""
    assert error(make_verifier(verifier), kind) > FOUND
    assert error(make_verifier("match"), kind) <= TOLERANCE


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


COIN = "rng.bernoulli(acceptance_ratio(float(residual[token]), draft_probs, token), depth, order)"
KEPT = "keep_prob * ratio"
HELD = "held = mass / (mass + (1 - keep_prob)) if mass > 0 else 0.0"
UPDATE = "parent.keep_prob = mass / (mass + (1 - parent.keep_prob)) if mass > 0 else 0.0"
LEFT = "left = subtract(parent.keep_prob * parent.residual, parent.draft.probs(child, parent.residual), token)"

REJECTION_MUTATIONS = {
    "children in reverse": ("enumerate(children)", "enumerate(children[::-1])"),
    "one bernoulli for all siblings": (COIN, COIN.replace(", order", "")),
    "one bernoulli for all depths": (COIN, COIN.replace("depth", "0")),
    "accepts with p and not p / q": (COIN, "rng.bernoulli(float(residual[token]), depth, order)"),
    "residual not normalised": (
        "normalised(subtract(residual, draft_probs, token), residual)",
        "subtract(residual, draft_probs, token)",
    ),
    "no residual": ("normalised(subtract(residual, draft_probs, token), residual)", "residual"),
    "q keeps the rejected token": ("draft.reject(child)", "pass"),
    "emits from the target": ("rng.draw(residual,", "rng.draw(target.probs(nodes[-1]),"),
}
RESIDUAL_MUTATIONS = {
    "no subtraction": ("return (scaled - draft_probs).clamp(min=0)", "return scaled"),
    "folded and not clamped": ("(scaled - draft_probs).clamp(min=0)", "(scaled - draft_probs).abs()"),
    "the wrong way round": ("(scaled - draft_probs).clamp(min=0)", "(draft_probs - scaled).clamp(min=0)"),
    "not normalised": ("return mass / total if bool(total > 0) else torch.clone(before)", "return mass"),
    "certain child stays after its rejection": ("    left = scaled.clone()\n    left[token] = 0", "    left = scaled"),
    "q not normalised": ("    return normalised(left, probs)", "    return left"),
    "q of independent draws loses tokens too": (" and self.tree.draws[source] is Draw.WITHOUT_REPLACEMENT", ""),
    "q of the first row for all": ("self.tree.draft_probs[source]", "self.tree.draft_probs[0]"),
    "accepts with p and not p / q": ("target_mass / float(draft_probs[token])", "target_mass"),
    "certain child has a q": (
        "return target_mass if draft_probs is None else target_mass / float(draft_probs[token])",
        "return min(1.0, 2 * target_mass) if draft_probs is None else target_mass / float(draft_probs[token])",
    ),
}
BLOCK_MUTATIONS = {
    "product of ratios without min": (f"min(1.0, {KEPT})", KEPT),
    "product of ratios each cut at one": (
        f"min(1.0, {KEPT})",
        "keep_prob * min(1.0, ratio)",
    ),
    "no product": (f"min(1.0, {KEPT})", KEPT.replace("keep_prob * ", "").join(["min(1.0, ", ")"])),
    "smallest kept position": ("if rng.bernoulli(held, i - 1):", "if rng.bernoulli(held, i - 1) and not kept:"),
    "stops at the first that is not kept": (
        "                kept, emitted_from = i, left",
        "                kept, emitted_from = i, left\n            else:\n                break",
    ),
    "residual without P": ("subtract(keep_prob * here,", "subtract(here,"),
    "keeps with P and not h": (HELD, "held = keep_prob"),
    "keeps with Z": (HELD, "held = mass"),
    "keeps with Z / (Z + 1)": (HELD, "held = mass / (mass + 1)"),
    "one bernoulli for all positions": ("rng.bernoulli(held, i - 1)", "rng.bernoulli(held, 0)"),
    "q of the token before": ("SiblingDraftProbs(tree).probs(i + 1, here)", "SiblingDraftProbs(tree).probs(i, here)"),
    "bonus from the target at the root": ("left, held = here, keep_prob", "left, held = target.probs(0), keep_prob"),
}
TRAVERSAL_MUTATIONS = {
    "alpha as before the deletion": (UPDATE, "pass"),
    "alpha S / (S + 1)": (UPDATE, "parent.keep_prob = mass / (mass + 1)"),
    "alpha S": (UPDATE, "parent.keep_prob = mass"),
    "alpha 0": (UPDATE, "parent.keep_prob = 0.0"),
    "residual without alpha": (LEFT, LEFT.replace("parent.keep_prob * ", "")),
    "product of ratios without min": ("min(1.0, here.keep_prob * ratio)", "here.keep_prob * ratio"),
    "product of ratios each cut at one": ("min(1.0, here.keep_prob * ratio)", "here.keep_prob * min(1.0, ratio)"),
    "no product": ("min(1.0, here.keep_prob * ratio)", "min(1.0, ratio)"),
    "ratio of the target and not of what is left": (
        "float(here.residual[token])",
        "float(target.probs(here.node)[token])",
    ),
    "last child first": ("parent.waiting.pop(0)", "parent.waiting.pop()"),
    "one bernoulli for all leaves": ("rng.bernoulli(here.keep_prob, 0, num_coins)", "rng.bernoulli(here.keep_prob, 0)"),
    "q keeps the rejected token": ("parent.draft.reject(child)", "pass"),
    "residual not normalised": ("parent.residual = normalised(left, parent.residual)", "parent.residual = left"),
    "emits from the target": ("rng.draw(here.residual,", "rng.draw(target.probs(here.node),"),
}

JUDGES = [
    Case(CERTAIN, chain(2)),
    Case(INDEPENDENT, chain(3)),
    Case(WITHOUT_REPLACEMENT, full(3)),
    Case(GROUP_AROUND, full(3)),
    Case(WITHOUT_REPLACEMENT, UNEVEN),
    Case(CERTAIN_FIRST, UNBALANCED),
    Case(INDEPENDENT, full(3)),
    Case(TOP_PLUS_ONE, full(2, 2)),
]


def fails(verifier: Verifier) -> bool:
    """Whether some case of the exactness proof rejects the verifier."""
    for case in JUDGES:
        if verifier.name != "block" or case.is_chain:
            try:
                if error(verifier, case.kind, case.shape, vocab=3) > FOUND:
                    return True
            except (AssertionError, ZeroDivisionError):  # rng used twice, or nothing left to draw from
                return True
    return False


@pytest.mark.parametrize("name", ["rejection", "block", "traversal"])
def test_our_verifiers_pass_the_same_judge(name: str) -> None:
    assert not fails(make_verifier(name))


@pytest.mark.parametrize("name", REJECTION_MUTATIONS)
def test_each_line_of_rejection_matters(name: str) -> None:
    """Guards the proof itself: a change that it would not notice is a hole in it."""
    assert fails(mutated(rejection, *REJECTION_MUTATIONS[name]).RejectionVerifier())


@pytest.mark.parametrize("name", BLOCK_MUTATIONS)
def test_each_line_of_block_verification_matters(name: str) -> None:
    assert fails(mutated(block, *BLOCK_MUTATIONS[name]).BlockVerifier())


def test_block_verification_refuses_branches_for_a_reason() -> None:
    """Without its check it keeps siblings as if one followed the other: the target is told to commit no path."""
    mutant = mutated(block, "if not tree.is_chain:", "if False:").BlockVerifier()
    with pytest.raises(AssertionError):
        error(mutant, INDEPENDENT)


@pytest.mark.parametrize("name", TRAVERSAL_MUTATIONS)
def test_each_line_of_traversal_verification_matters(name: str) -> None:
    assert fails(mutated(traversal, *TRAVERSAL_MUTATIONS[name]).TraversalVerifier())


@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
@pytest.mark.parametrize("name", RESIDUAL_MUTATIONS)
def test_each_line_of_the_shared_algebra_matters(name: str, verifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutated(residual, *RESIDUAL_MUTATIONS[name])
    for used in ("SiblingDraftProbs", "acceptance_ratio", "normalised", "subtract"):
        monkeypatch.setattr({"rejection": rejection, "traversal": traversal}[verifier], used, getattr(mutant, used))
    assert fails(make_verifier(verifier))


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


@pytest.mark.parametrize("kind", [INDEPENDENT, WITHOUT_REPLACEMENT], ids=lambda kind: kind.name)
def test_accepting_on_a_coin_of_at_most_p_is_found(kind: Kind) -> None:
    """``<`` made ``<=`` in specdec/rng.py accepts tokens of probability 0 when the uniform number is 0."""
    mutant = mutated(noise_module, "(int(word) + 0.5) * 2.0**-32 < prob", "int(word) * 2.0**-32 <= prob")
    loop = Loop(Case(kind, full(2)).drafter(), RejectionVerifier())
    assert_possible(loop, EdgeNoise)
    with pytest.raises(AssertionError):
        assert_possible(loop, lambda draws: EdgeNoise(draws, mutant.PhiloxRowRng))
