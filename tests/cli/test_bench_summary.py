"""The arithmetic of a bench on made-up measurements, and the judgement of differences."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinychat
import torch

from specdec.cli.bench_config import BenchConfig
from specdec.cli.matching import Judge
from specdec.cli.measure import Batch, Output
from specdec.cli.results import Group, Question, Results, Turn
from specdec.cli.summary import geometric_mean, summarise
from specdec.cli.table import conclusion, notes, print_summary
from specdec.records.prompts import Prompt
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY, SamplingParams, sampling_probs


class Named:
    """A method that is only a name."""

    def __init__(self, name, drafter=None, verifier=None, lossless=True):
        self.name, self.drafter, self.verifier, self.lossless = name, drafter, verifier, lossless


HF, PLAIN, NGRAM = Named("hf-generate"), Named("plain", verifier="match"), Named("ngram", "ngram", "match")


def output(num_tokens, total_s, first_s=0.0, num_rows=1):
    tokens = tuple((1,) * num_tokens for _ in range(num_rows))
    return Output(tokens, total_s, first_s, num_rows, tuple((1,) * num_tokens for _ in range(num_rows)))


def group(number, category, outputs, size=1):
    questions = tuple(Question(number + i, Prompt(str(number + i), category, ("x",), False)) for i in range(size))
    batch = Batch(((1,),) * size, tuple(q.number for q in questions), 9)
    return Group(questions, [Turn(questions, batch, outputs)])


def results(groups, methods=(HF, PLAIN, NGRAM), judge=None, **options):
    provenance = {"settings": {"temperature": 0.0, "verifier": "match"}}
    return Results(BenchConfig(**options), list(methods), [], provenance, judge or Judge(None, GREEDY, 0), groups)


def test_speedup_is_the_geometric_mean_of_ratios():
    groups = [
        group(0, "a", {HF: output(10, 4.0), PLAIN: output(10, 4.0), NGRAM: output(10, 1.0)}),
        group(1, "b", {HF: output(10, 1.0), PLAIN: output(10, 1.0), NGRAM: output(10, 1.0)}),
    ]
    *_, row = summarise(results(groups))["rows"]
    assert row["speedup"] == pytest.approx(2.0)
    assert (row["speedup_low"], row["speedup_high"]) == pytest.approx((1.0, 4.0))
    assert row["categories"]["a"]["speedup"] == pytest.approx(4.0)
    assert row["categories"]["b"]["speedup"] == pytest.approx(1.0)
    assert row["tokens_per_s"] == pytest.approx(10.0)


def test_a_group_weighs_as_many_questions_as_it_holds():
    groups = [
        group(
            0,
            "a",
            {HF: output(5, 2.0, num_rows=3), PLAIN: output(5, 2.0, num_rows=3), NGRAM: output(5, 1.0, num_rows=3)},
            3,
        ),
        group(3, "a", {HF: output(5, 1.0), PLAIN: output(5, 1.0), NGRAM: output(5, 1.0)}),
    ]
    *_, row = summarise(results(groups))["rows"]
    assert row["speedup"] == pytest.approx(2 ** (3 / 4))
    assert (row["num_prompts"], row["num_measurements"]) == (4, 2)


def test_the_speedup_without_prefill_counts_what_came_after_the_first_pass():
    outputs = {HF: output(11, 6.0, 1.0), PLAIN: output(11, 6.0, 1.0), NGRAM: output(11, 3.5, 1.0)}
    *_, row = summarise(results([group(0, "a", outputs)]))["rows"]
    assert row["speedup"] == pytest.approx(6 / 3.5)
    assert row["speedup_decode"] == pytest.approx(2.0)
    assert row["speedup_vs_plain"] == pytest.approx(6 / 3.5), "plain decoding took as long as the baseline"


def test_without_any_later_token_there_is_no_decode_speedup():
    outputs = {m: output(1, 1.0, 1.0) for m in (HF, PLAIN, NGRAM)}
    *_, row = summarise(results([group(0, "a", outputs)]))["rows"]
    assert row["speedup_decode"] is None


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    """Of 200 samples of 40 ratios around 1.5x, 95 % intervals hold it in at least 85 % (odds of a false alarm < 1e-6)."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        estimate = geometric_mean(np.exp(rng.normal(math.log(1.5), 0.3, 40)).tolist(), [1.0] * 40)
        held += estimate.low <= 1.5 <= estimate.high
    assert held >= 170


def test_equal_ratios_leave_no_doubt():
    estimate = geometric_mean([1.25] * 10, [1.0] * 10)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((1.25, 1.25, 1.25))


def row(speedup, low, high, **changes):
    match = {
        "identical": 4,
        "total": 4,
        "explained": 0,
        "unexplained": 0,
        "compared_with": "hf-generate",
        "differences": [],
    }
    base = {"method": "ngram", "drafter": "ngram", "verifier": "match", "lossless": True, "num_measurements": 4}
    base |= {"speedup": speedup, "speedup_low": low, "speedup_high": high, "match": match | changes.pop("match", {})}
    return base | changes


BEST = "ngram generates 1.42x [1.35, 1.50] as fast as Hugging Face generate() on this machine, with identical tokens (4 of 4)."
DISTRUST = "but 1 of 4 outputs differ for no known reason: do not trust the speed"


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (row(1.42, 1.35, 1.5), BEST),
        (row(0.82, 0.7, 0.9), "ngram is slower here: it generates 0.82x"),
        (row(1.1, 0.9, 1.3), "ngram shows no clear gain: it generates 1.10x [0.90, 1.30]"),
        (row(1.4, 1.4, 1.4, num_measurements=1), "in a single measurement, which says little"),
        (row(1.4, 1.3, 1.5, match={"identical": 3, "unexplained": 1}), DISTRUST),
        (row(1.4, 1.3, 1.5, match={"identical": 3, "explained": 1}), "(3 of 4; the others differ at near ties"),
        (
            row(1.4, 1.3, 1.5, match={"compared_with": "plain"}),
            "identical to plain decoding with the same seed (4 of 4)",
        ),
        (row(1.4, 1.3, 1.5, match={"compared_with": None}), "with the same distribution"),
        (row(1.4, 1.3, 1.5, lossless=False), "its verifier is lossy"),
    ],
)
def test_the_conclusion_says_what_was_measured(measured, said):
    assert said in conclusion({"rows": [measured]})


def test_the_conclusion_tells_speculation_from_faster_layers():
    """A speedup over generate() holds both; whoever reads one sentence must not take it all for speculation."""
    vs_plain = {"speedup_vs_plain": 1.2, "speedup_vs_plain_low": 1.1, "speedup_vs_plain_high": 1.3}
    assert "Speculation alone brings 1.20x [1.10, 1.30]" in conclusion({"rows": [row(1.42, 1.35, 1.5, **vs_plain)]})


def test_every_unexplained_difference_is_shown_and_a_few_near_ties():
    names = {"question_id": "q", "turn": 0, "expected": 1, "got": 2, "margin": 0.1}
    differences = [names | {"position": i, "is_explained": i >= 6} for i in range(16)]
    measured = row(1.4, 1.3, 1.5, match={"differences": differences, "unexplained": 6, "explained": 10})
    settings = {"settings": {"temperature": 0.0, "verifier": "match"}}
    said = "\n".join(notes({"rows": [measured], "partial": False, "skipped": [], "provenance": settings}))
    assert (said.count("UNEXPLAINED"), said.count("a near tie")) == (6, 4)
    assert "6 more outputs differ at near ties" in said


def test_the_table_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    from rich.console import Console

    groups = [group(i, "a", {m: output(10, 1.0 + i * (m is NGRAM)) for m in (HF, PLAIN, NGRAM)}) for i in range(2)]
    print_summary(
        summarise(results(groups)), Console(width=80, highlight=False, force_terminal=True, color_system=None)
    )
    table = capsys.readouterr().out.splitlines()[:6]
    assert any("0.71x [0.50, 1.00]" in line for line in table)
    assert all(len(line.rstrip()) <= 80 for line in table)


@pytest.fixture(scope="module")
def model():
    return tinychat.make_model()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


PROMPT = [5, 6, 7]


def judged(model, expected, got, params=GREEDY):
    return Judge(model, params, 0).compare(PROMPT, 0, expected, got, "q", 0)


def test_identical_outputs_are_no_difference(model):
    assert judged(model, (1, 2), (1, 2)) is None


def test_another_token_than_the_targets_is_unexplained(model):
    best, second, *_ = logits_of(model, PROMPT).topk(3).indices.tolist()
    found = judged(model, (best, 1), (second, 1))
    assert (found.position, found.expected, found.got, found.is_explained) == (0, best, second, False)
    assert found.margin > 1e-3


def test_a_near_tie_is_explained_wherever_it_comes():
    model = tinychat.make_model()
    best, other = logits_of(model, PROMPT).topk(2).indices.tolist()
    nxt = int(logits_of(model, [*PROMPT, best]).argmax())
    model.get_output_embeddings().weight.data[other] = model.get_output_embeddings().weight.data[nxt] * (1 + 1e-6)
    if int(logits_of(model, PROMPT).argmax()) != best:
        pytest.fail("the change moved the first token")
    found = judged(model, (best, nxt, 4), (best, other, 9))
    assert (found.position, found.is_explained) == (1, True)
    assert found.margin < 1e-3


def test_a_near_tie_of_two_other_tokens_explains_nothing():
    """The two best may be tied while the emitted one lies far below: a small top-2 margin alone is no excuse."""
    model = tinychat.make_model()
    best, second, third = logits_of(model, PROMPT).topk(3).indices.tolist()
    model.get_output_embeddings().weight.data[second] = model.get_output_embeddings().weight.data[best]
    assert judged(model, (best,), (second,)).is_explained
    assert not judged(model, (best,), (third,)).is_explained


def test_an_output_that_stops_early_is_unexplained(model):
    found = judged(model, (1, 2, 3), (1, 2))
    assert (found.position, found.expected, found.got, found.margin, found.is_explained) == (2, 3, None, None, False)


def test_the_tolerance_fits_the_dtype():
    best, second = logits_of(tinychat.make_model(), PROMPT).topk(2).indices.tolist()
    for dtype, tolerance in (
        (torch.float64, 1e-9),
        (torch.float32, 1e-3),
        (torch.bfloat16, 0.25),
        (torch.float16, 0.25),
    ):
        judge = Judge(tinychat.make_model().to(dtype), GREEDY, 0)
        assert judge.tolerance == tolerance
        difference = judge.compare(PROMPT, 0, (best,), (second,), "q", 0)
        assert difference.is_explained == (difference.margin <= tolerance)


class Rounding:
    """A 16-bit model for which token 1 leads token 2 by 0.375, but by ``in_block`` where 8 tokens end the text at once."""

    dtype, device = torch.bfloat16, "cpu"

    def __init__(self, in_block: float) -> None:
        self.in_block = in_block

    def forward(self, **_: Any) -> None: ...

    def __call__(self, input_ids: torch.Tensor, past_key_values: object = None, use_cache: bool = False) -> Any:
        lead = self.in_block if past_key_values is not None and input_ids.shape[1] == 8 else 0.375
        logits = torch.tensor([0.0, 9.0, 9.0 - lead, -5.0]).repeat(1, input_ids.shape[1], 1)
        return SimpleNamespace(logits=logits, past_key_values=object())


@pytest.mark.parametrize(("in_block", "is_explained"), [(0.0, True), (0.25, True), (0.3, False)])
def test_in_16_bits_a_block_pass_of_the_model_itself_may_explain_a_difference(
    in_block: float, is_explained: bool
) -> None:
    """Seen with SmolLM2 in bfloat16: 0.375 apart in one forward, tied where the last 8 tokens come as a block."""
    judge = Judge(Rounding(in_block), GREEDY, 0)
    found = judge.compare(list(range(20)), 0, (1,), (2,), "q", 0)
    assert found is not None
    assert (found.margin, found.is_explained) == (pytest.approx(in_block), is_explained)
    worse = judge.compare(list(range(20)), 0, (1,), (3,), "q", 0)
    assert worse is not None
    assert not worse.is_explained


def test_sampled_outputs_are_judged_by_the_scores_that_the_noise_makes(model):
    """At temperature 2 the sample is the argmax of log p + noise: the runner-up lies a margin below it."""
    params, rng = SamplingParams(temperature=2.0), PhiloxRng(0).at(0, len(PROMPT))
    probs = sampling_probs(logits_of(model, PROMPT), params)
    drawn = rng.draw(probs, 0)
    scores = 2.0 * (probs.double().log() + rng.gumbel(torch.arange(len(probs)), 0))
    second = int(scores.topk(2).indices[1])
    found = judged(model, (drawn,), (second,), params)
    assert found.margin == pytest.approx(float(scores[drawn] - scores[second]), abs=1e-4)
    assert not found.is_explained


def test_a_match_counts_every_output_once():
    model = tinychat.make_model()
    best = int(logits_of(model, [1]).argmax())
    right, wrong = Output(((best,),), 1.0, 1.0, 1, ((1,),)), Output((((best + 1) % 9,),), 1.0, 1.0, 1, ((1,),))
    groups = [
        group(0, "a", {HF: right, PLAIN: right, NGRAM: right}),
        group(1, "b", {HF: right, PLAIN: right, NGRAM: wrong}),
    ]
    *_, found = summarise(results(groups, judge=Judge(model, GREEDY, 0)))["rows"]
    counts = [found["match"][key] for key in ("identical", "total", "explained", "unexplained")]
    assert counts == [1, 2, 0, 1]
    assert found["categories"]["a"]["match"]["identical"] == 1
    (difference,) = found["categories"]["b"]["match"]["differences"]
    assert (difference["question_id"], difference["turn"], difference["position"]) == ("1", 0, 0)
