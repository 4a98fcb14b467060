"""Two runs, or two methods of one run, paired by prompt: which is faster, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specdec.analysis.acceptance import mean_acceptance_length
from specdec.analysis.columns import Trace
from specdec.analysis.intervals import Estimate, geometric_mean

NUM_FLIPS = 20_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """``a`` against ``b`` over the questions that both have."""

    name_a: str
    name_b: str
    speed: Estimate  # tokens per second of a over those of b
    p_value: float  # two-sided, by random signs: how often chance alone would part them as far
    num_faster: int  # questions on which a is faster
    num_same_text: int  # questions on which all tokens are equal
    length_a: Estimate  # mean acceptance length
    length_b: Estimate

    @property
    def verdict(self) -> str:
        """One sentence."""
        n = self.speed.num_prompts
        if n < 2:
            return f"{self.name_a} and {self.name_b} share {n} prompt: too few to compare"
        ratio, low, high = self.speed.value, self.speed.low, self.speed.high
        if low <= 1 <= high or self.p_value > 0.05:
            return (
                f"no difference in speed is proved: {self.name_a} is {ratio:.2f}x [{low:.2f}, {high:.2f}] as fast as "
                f"{self.name_b} on {n} prompts (p = {self.p_value:.2g})"
            )
        what = "faster" if ratio > 1 else "slower"
        return (
            f"{self.name_a} is {what} than {self.name_b}: {ratio:.2f}x [{low:.2f}, {high:.2f}] on {n} prompts, "
            f"faster on {self.num_faster} of them (p = {self.p_value:.2g})"
        )


@dataclass(slots=True)
class _Question:
    tokens: tuple[tuple[int, ...], ...] = ()
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def compare(a: Trace, b: Trace) -> Comparison:
    """Pair the questions of ``a`` with those of ``b``, each of one method (``trace.select("ngram")``).

    Raises:
        ValueError: one of them holds several methods, or they share no question.
    """
    of_a, of_b = _questions(a), _questions(b)
    shared = [question for question in of_a if question in of_b]
    if not shared:
        raise ValueError("the runs share no question, so nothing can be paired: use the same prompts file for both")
    ratios = [of_a[question].rate / of_b[question].rate for question in shared]
    return Comparison(
        name_a=a.names[0],
        name_b=b.names[0],
        speed=geometric_mean(ratios),
        p_value=_sign_test(np.log(ratios)),
        num_faster=sum(ratio > 1 for ratio in ratios),
        num_same_text=sum(of_a[question].tokens == of_b[question].tokens for question in shared),
        length_a=mean_acceptance_length(a),
        length_b=mean_acceptance_length(b),
    )


def _questions(trace: Trace) -> dict[str, _Question]:
    """All turns of each question; a batch's seconds are shared out by tokens."""
    if len(trace.names) != 1:
        raise ValueError(f"compare one method with another, got {', '.join(trace.names) or 'none'}; use trace.select")
    in_batch: dict[tuple[int, int, int], int] = {}
    for output in trace.outputs:
        key = (output.label.run, output.group, output.label.turn)
        in_batch[key] = in_batch.get(key, 0) + output.num_tokens
    questions: dict[str, _Question] = {}
    for output in trace.outputs:
        question = questions.setdefault(output.label.question_id, _Question())
        question.tokens += (output.token_ids,)
        whole = in_batch[output.label.run, output.group, output.label.turn]
        question.seconds += output.wall_s * output.num_tokens / whole
    return {name: question for name, question in questions.items() if question.seconds > 0}


def _sign_test(logs: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """How often the mean of ``logs`` is as far from 0 if each one's sign is a coin toss; the same at every call.

    The observed signs count as one of the tosses, so that the value is never 0.
    """
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(NUM_FLIPS, len(logs)))
    means = np.abs((signs * logs).mean(1))
    # Sums in another order round differently; equal means must count as equal.
    return float((1 + np.count_nonzero(means >= abs(logs.mean()) * (1 - 1e-12))) / (1 + NUM_FLIPS))
