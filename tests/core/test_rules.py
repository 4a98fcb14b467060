"""What the rules promise beside being exact: equal laws, how much they accept, greedy shortcuts, and that lossy is said.

Everything is computed, by enumeration or in closed form; nothing is sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from enumeration import Loop, exact_joint, first_step, stepwise_joint, total_variation
from exact_cases import CASES, SMALL, TOLERANCE, Case, greedy_law, is_exact
from torch import Tensor
from toy import (
    BY_CONTEXT,
    CERTAIN,
    GROUP_AROUND,
    INDEPENDENT,
    LEAF,
    PROMPT,
    TOP_PLUS_ONE,
    UNBALANCED,
    UNEVEN,
    WITHOUT_REPLACEMENT,
    Kind,
    Shape,
    Tokens,
    ToyDrafter,
    ToyTarget,
    chain,
    full,
)

from specdec.distributions import WarperTransform
from specdec.interfaces import Limit, Row, TargetDistributions
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY, SamplingParams
from specdec.verifiers import VERIFIERS, make_verifier

CONTEXTS: list[Tokens] = list(itertools.product(range(3), repeat=2))
LOSSLESS = [name for name in VERIFIERS if make_verifier(name).lossless]


def num_accepted(verifier: str, kind: Kind, shape: Shape, seed: int, prompt: Tokens) -> float:
    """Expected accepted drafts of the first pass."""
    loop = Loop(ToyDrafter(kind, shape), make_verifier(verifier), ToyTarget(seed))
    return sum(len(nodes) * prob for (nodes, _), prob in first_step(loop, prompt).items())


@pytest.mark.parametrize("kind", [CERTAIN, INDEPENDENT, WITHOUT_REPLACEMENT, BY_CONTEXT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_block_verification_is_traversal_of_a_chain(kind: Kind, depth: int) -> None:
    """The same law of accepted nodes and tokens together, although one goes up the chain and the other down."""
    for seed, prompt in itertools.product((1, 2, 3), CONTEXTS[::2]):
        laws = [
            first_step(Loop(ToyDrafter(kind, chain(depth)), make_verifier(name), ToyTarget(seed)), prompt)
            for name in ("block", "traversal")
        ]
        assert total_variation(*laws) <= TOLERANCE


@pytest.mark.parametrize(
    ("verifier", "shape"),
    [("block", chain(1)), ("block", chain(2)), ("block", chain(3))]
    + [("traversal", shape) for shape in (UNBALANCED, UNEVEN, full(2, 1))],
    ids=str,
)
@pytest.mark.parametrize("kind", [CERTAIN, INDEPENDENT, TOP_PLUS_ONE, GROUP_AROUND], ids=lambda kind: kind.name)
def test_deciding_from_the_leaves_accepts_no_less(verifier: str, shape: Shape, kind: Kind) -> None:
    """Than rejection, in expectation; the same for certain drafts and single tokens, else somewhere more."""
    gains = [
        num_accepted(verifier, kind, shape, seed, prompt) - num_accepted("rejection", kind, shape, seed, prompt)
        for seed, prompt in itertools.product((1,), CONTEXTS[::2])
    ]
    assert min(gains) >= -TOLERANCE
    assert (max(gains) > 0.01) == (kind is not CERTAIN and shape != chain(1))


@pytest.mark.parametrize("prompt", [PROMPT, (2, 2)])
def test_a_path_that_is_kept_for_certain_is_kept_for_certain(prompt: Tokens) -> None:
    """Guards S / (S + 1 - keep) for keep = 1, which must be 1: rounding above it divided by zero two children later."""
    drafter = ToyDrafter(WITHOUT_REPLACEMENT, (LEAF, LEAF, chain(1)), seed=18)
    loop = Loop(drafter, make_verifier("traversal"), ToyTarget(3))
    expected = exact_joint(loop.target, prompt, 4)
    assert total_variation(stepwise_joint(loop, 4, [prompt]), expected) <= TOLERANCE


@dataclass(frozen=True, slots=True)
class NotKnownGreedy:
    """Greedy probabilities that do not say so: the verifier has to take the long way with one-hot rows."""

    inner: TargetDistributions
    is_greedy: bool = False

    def probs(self, node: int) -> Tensor:
        return self.inner.probs(node)

    def best(self, node: int) -> int:
        raise AssertionError("the shortcut was taken")


@pytest.mark.parametrize("verifier", LOSSLESS)
def test_the_greedy_shortcut_equals_the_long_way(verifier: str) -> None:
    """Guards a temperature of 0 that accepts other nodes than the limit of small temperatures does."""
    rng, limit, num_steps = PhiloxRng(3), Limit(3, 16), 0
    for case in CASES.values():
        if not is_exact(verifier, case):
            continue
        target, drafter = ToyTarget(), case.drafter()
        rows = [Row(key, [9, *prompt], 20) for key, prompt in enumerate(CONTEXTS)]
        target.open(rows)
        drafter.begin(rows)
        trees = drafter.propose(rows, [limit] * len(rows), SamplingParams(), rng)
        for row, tree, scores in zip(rows, trees, target.score(rows, trees), strict=True):
            probs = WarperTransform(GREEDY).target_probs(row, tree, scores)
            row_noise = rng.at(row.key, len(row.tokens))
            verdicts = [make_verifier(verifier).verify(tree, p, row_noise) for p in (probs, NotKnownGreedy(probs))]
            assert verdicts[0] == verdicts[1]
            num_steps += 1
    assert num_steps >= 9 * 6


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_typical_acceptance_is_lossy_and_says_so(case: Case) -> None:
    """Guards the flag that reports go by. At temperature 0 nothing is lost."""
    verifier = make_verifier("typical")
    assert not verifier.lossless
    loop = Loop(case.drafter(), verifier)
    assert total_variation(stepwise_joint(loop, 3), exact_joint(loop.target, PROMPT, 3)) > 1e-3
    greedy = Loop(case.drafter(), verifier, logits_transform=WarperTransform(GREEDY))
    assert total_variation(stepwise_joint(greedy, 4), exact_joint(greedy.target, PROMPT, 4, greedy_law)) <= TOLERANCE


def test_typical_acceptance_is_the_only_lossy_one() -> None:
    assert set(VERIFIERS) - set(LOSSLESS) == {"typical"}


# ----- the probability that one of k children is accepted -----


def accept_top(p: Tensor, q: Tensor, k: int) -> float:
    return float(p[q.topk(k).indices].sum())


def accept_independent(p: Tensor, q: Tensor, k: int) -> float:
    refused = 1.0
    for _ in range(k):
        refused *= 1 - float(torch.minimum(p, q).sum())
        p = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
    return 1 - refused


def accept_without_replacement(p: Tensor, q: Tensor, k: int) -> float:
    """One row of p, q and weight for each sequence of rejected tokens."""
    weight, p, q, accepted = p.new_ones(1), p[None], q[None], 0.0
    for attempt in range(k):
        accepted += float((weight * torch.minimum(p, q).sum(-1)).sum())
        if attempt < k - 1:
            lost = (q - p).clamp(min=0)  # each token's probability to be drawn and rejected
            sequence, token = lost.nonzero(as_tuple=True)
            weight = weight[sequence] * lost[sequence, token]
            left = (p - q).clamp(min=0)
            p = (left / left.sum(-1, keepdim=True))[sequence]
            q = q[sequence].scatter(1, token[:, None], 0.0)
            q = q / q.sum(-1, keepdim=True)
    return accepted


def accept_top_plus_one(p: Tensor, q: Tensor, k: int) -> float:
    best = q.topk(k - 1).indices
    rest = q.index_fill(0, best, 0.0)
    return float(p[best].sum() + torch.minimum(p, rest / rest.sum()).sum())


FORMULAS: dict[str, tuple[Kind, Callable[[Tensor, Tensor, int], float]]] = {
    "top plus one": (TOP_PLUS_ONE, accept_top_plus_one),
    "without replacement": (WITHOUT_REPLACEMENT, accept_without_replacement),
    "independent": (INDEPENDENT, accept_independent),
    "top": (CERTAIN, accept_top),
}


@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_first_level_accepts_as_often_as_the_formula_says(name: str, k: int, verifier: str) -> None:
    """Two ways to the same number: the verifier's enumerated outcomes, and arithmetic without any code of ours."""
    kind, formula = FORMULAS[name]
    drafter, target = ToyDrafter(kind, full(k), vocab=5), ToyTarget(4, vocab=5)
    for prompt in ((0, 1), (3, 2), (4, 4)):
        law = first_step(Loop(drafter, make_verifier(verifier), target), prompt)
        accepted = sum(prob for (nodes, _), prob in law.items() if nodes)
        row = prompt[0] * 5 + prompt[1]
        assert abs(accepted - formula(target.logits[row].softmax(-1), drafter.tables[0][row], k)) <= TOLERANCE


def mean_acceptance(k: int, spread: float, rng: float) -> dict[str, float]:
    """Over pairs of 50 tokens: target logits spread * N(0, 1), draft logits those + noise * N(0, 1)."""
    generator, total = torch.Generator().manual_seed(1), dict.fromkeys(FORMULAS, 0.0)
    for _ in range(4):
        logits = spread * torch.randn(50, dtype=torch.float64, generator=generator)
        draft = logits + rng * torch.randn(50, dtype=torch.float64, generator=generator)
        for name, (_, formula) in FORMULAS.items():
            total[name] += formula(logits.softmax(-1), draft.softmax(-1), k) / 4
    return total


@pytest.mark.parametrize("k", [2, 3, 4])
def test_greedy_multi_draft_accepts_most_where_the_draft_is_peaked(k: int) -> None:
    """The order of docs/verification.md, with most of the mass on few tokens as language models have it."""
    mean = mean_acceptance(k, 3.0, 0.6)
    assert mean["top plus one"] > mean["without replacement"] + 0.01
    assert mean["without replacement"] > mean["independent"] + 0.01
    assert mean["independent"] > mean["top"] + 0.01


def test_draws_without_replacement_accept_most_where_the_draft_is_flat() -> None:
    """No rule is best everywhere: over flat distributions certain children are wasted."""
    for k in (2, 3, 4):
        mean = mean_acceptance(k, 1.0, 1.0)
        assert mean["without replacement"] > max(mean["top plus one"], mean["independent"]) > mean["top"] + 0.2
