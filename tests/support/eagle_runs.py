"""Runs of the decode loop with an EAGLE drafter, and the tolerance of comparisons with a reference."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.budget.adaptive import FixedBudget
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters.eagle import EagleDrafter
from specdec.interfaces import Row
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY, SamplingParams
from specdec.verifiers import make_verifier

VOCAB = 11  # so few that random heads are accepted often
PROMPTS = [[5, 9, 3, 7, 1], [8, 9], [4], [2, 7, 6, 10, 9, 8, 3, 3, 1]]
EXACT = 1e-5  # relative; parts of the target run in float32. A wrong mask or position is off by 0.1


def run(
    drafter: EagleDrafter, prompts: Sequence[Sequence[int]], num_tokens: int, params: SamplingParams = GREEDY,
    verifier: str = "match", max_rows: int | None = None,
) -> tuple[list[list[int]], float]:  # fmt: skip
    """The texts, and the tokens accepted for each step."""
    rows = [Row(key, list(prompt), len(prompt) + num_tokens + key) for key, prompt in enumerate(prompts)]
    decoder = Decoder(
        drafter.engine.target, drafter, make_verifier(verifier), WarperTransform(params), PhiloxRng(3),
        lambda row: False, FixedBudget(24),
    )  # fmt: skip
    steps = [emission.step for emission in decoder.run(rows, max_rows)]
    return [row.tokens for row in rows], sum(step.num_accepted for step in steps) / len(steps)
