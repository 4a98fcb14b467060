"""From a bench to its analysis: what ``bench --trace`` writes holds all that the analysis needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinychat

from specdec.analysis import acceptance, report, speedup
from specdec.analysis.load import load
from specdec.analysis.report.facts import facts_of_trace


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tinychat.save(tmp_path_factory.mktemp("target"))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path) -> Any:
    """Run ``specdec bench`` on the tiny model with two short prompts; the trace and the result."""
    command = tinychat.Command(monkeypatch, capsys)
    prompts = tinychat.write_prompts(tmp_path / "p.jsonl", tinychat.QUESTIONS[1:3])

    def run(*options: str) -> tuple[Any, dict[str, Any]]:
        words = ["--target", target, "--prompts", prompts, "--max-new-tokens", "12", "--threads", "1", "--fixed"]
        words += ["--trace", str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "b.json")]
        command("bench", *words, "--drafter", "hybrid", *options)
        return load(tmp_path / "t.jsonl"), json.loads((tmp_path / "b.json").read_text())

    return run


def test_prompts_texts_and_promises_are_in_the_trace(bench: Any, tmp_path: Path) -> None:
    trace, result = bench()
    (run,) = trace.runs
    tokenizer = tinychat.make_tokenizer()
    used = {token for output in trace.outputs for token in output.token_ids} | set(trace.steps.tree_tokens.tolist())
    assert used <= set(run.texts)
    asked = {str(question["question_id"]): question["turns"][0] for question in tinychat.QUESTIONS[1:3]}
    for (_, question, turn), ids in trace.prompts.items():
        assert tokenizer.decode(ids).startswith("<user>")
        if turn == 0:
            assert asked[question] in tokenizer.decode(ids)
    assert len(trace.prompts) == len({(o.label.question_id, o.label.turn) for o in trace.outputs})
    assert {output.lossless for output in trace.outputs} == {True}
    assert trace.steps.node_probs is None
    rows = {row["drafter"] or row["method"]: row for row in result["rows"]}
    for name, estimate in speedup.speedups(trace).items():
        assert estimate.value == pytest.approx(rows[name]["speedup"])


def test_a_lossy_method_is_told_by_the_trace(bench: Any) -> None:
    """Above temperature 0 typical acceptance changes the text; no report may put it first."""
    trace, _ = bench("--verifier", "typical", "--temperature", "1")
    facts = facts_of_trace(trace)
    assert {each.name: each.is_lossless for each in facts.methods}["hybrid"] is False
    assert facts.best is None


def test_probabilities_are_written_when_asked_for(bench: Any) -> None:
    trace, _ = bench("--trace-probs")
    steps = trace.steps
    assert steps.node_probs is not None
    assert steps.entropies is not None
    assert steps.token_probs is not None
    assert not np.isnan(steps.node_probs).any()
    assert ((steps.node_probs >= 0) & (steps.node_probs <= 1.0001)).all()
    assert (steps.node_probs[steps.tree_offsets[:-1]] == 1).all()
    assert ((steps.entropies >= 0) & (steps.entropies <= np.log(tinychat.VOCAB) + 1e-6)).all()
    found = acceptance.attempts(trace)
    kept = np.flatnonzero(found.met)
    # Greedy: what was accepted is the likeliest token, so nothing is likelier than 1 / its probability would allow.
    assert (steps.token_probs[kept] > 1 / tinychat.VOCAB).all()


def test_looking_behind_steps_is_left_out_of_the_seconds(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow look must not make a method slow: here it takes longer than everything else together."""
    import time

    from specdec.cli import measure

    real = measure.details

    def slow(emission: Any) -> Any:
        time.sleep(0.1)
        return real(emission)

    monkeypatch.setattr(measure, "details", slow)
    trace, _ = bench("--trace-probs")
    own = trace.select("hybrid")
    looked = 0.1 * len(own.steps)
    assert sum(output.wall_s for output in own.outputs) < looked


def test_probabilities_without_a_trace_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, target: str) -> None:
    ran = tinychat.Command(monkeypatch, capsys)("bench", "--target", target, "--trace-probs")
    assert "add --trace" in ran.err


def test_batches_are_reported_too(bench: Any, tmp_path: Path) -> None:
    trace, result = bench("--batch-size", "2", "--trace-probs")
    rows = {row["drafter"] or row["method"]: row for row in result["rows"]}
    for each in acceptance.summarise(trace):
        row = rows["plain" if each.name == "plain" else each.name]
        assert each.mean_acceptance_length.value == pytest.approx(row["mean_acceptance_length"])
        assert each.num_draft_tokens == row["num_draft_tokens"]
    assert "question-0-1" in report.build([tmp_path / "t.jsonl"])
