"""``specdec bench --workload``: every engine serves the same requests, and its tokens are those of each request alone."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tinychat

from specdec.cli.bench_config import BenchConfig
from specdec.cli.workload import run_workload
from specdec.cli.workload_cache import slots_of_pass
from specdec.cli.workload_hf import HfContinuous
from specdec.cli.workload_options import WorkloadOptions, parse_engine
from specdec.cli.workload_runs import Asked, Queue, Run, Served, in_batches
from specdec.cli.workload_summary import summarise_workload
from specdec.interfaces import Verdict
from specdec.records.trace import read_trace
from specdec.records.workloads import Request
from specdec.serving.pass_record import PassRecord, RowRecord
from specdec.verifiers.match import MatchVerifier

ALL = ["paged", "ragged", "hf", "hf-batch"]


@pytest.fixture(scope="module")
def target(tmp_path_factory, one_thread):
    model = tinychat.make_model(max_position_embeddings=4096, eos=None)
    return tinychat.save(tmp_path_factory.mktemp("target"), model)


@pytest.fixture(scope="module")
def bench(target):
    """Run a workload on the tiny model; its JSON."""

    def run(workload: str, **options: Any) -> dict[str, Any]:
        serving = {
            name: options.pop(name)
            for name in ("engines", "max_rows", "kv_memory", "repeats")
            if name in options
        }  # fmt: skip
        config = BenchConfig(
            **{"target": target, "max_new_tokens": 10, "drafters": ["ngram"], "adaptive": False, **options},
            serving=WorkloadOptions(workload=workload, **serving),
        )  # fmt: skip
        return summarise_workload(run_workload(config, tell=lambda *_: None))

    return run


@pytest.fixture(scope="module")
def chat(bench, tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "t.jsonl"
    return bench("chat:n=3", engines=ALL, max_rows=[2], repeats=2, trace=trace), trace


def row_of(summary: dict[str, Any], engine: str) -> dict[str, Any]:
    return next(row for row in summary["rows"] if row["engine"] == engine)


def test_every_engine_answers_as_each_request_alone(chat):
    summary, _ = chat
    for engine in ALL:
        row = row_of(summary, engine)
        assert row["match"]["identical"] == row["match"]["total"] == 12  # two repeats of three times two turns
        assert row["num_tokens"] == 60
        assert row["tokens_per_s"] == sorted(row["tokens_per_s_each"])[0] / 2 + sorted(row["tokens_per_s_each"])[1] / 2
    json.dumps(summary, allow_nan=False)


def test_second_turns_come_after_the_first_and_find_its_prefix(chat):
    summary, _ = chat
    for engine in ALL:
        requests = {each["request_id"]: each for each in row_of(summary, engine)["requests"]}
        for i in range(3):
            first, second = requests[f"chat-{i}.1"], requests[f"chat-{i}.2"]
            assert second["arrival_s"] >= first["end_s"]
            assert second["num_prompt"] > first["num_prompt"] + first["num_tokens"]
            if engine == "paged":
                assert second["num_cached"] >= first["num_prompt"], "the whole first turn is known"


def test_times_are_in_order(chat):
    summary, _ = chat
    for row in summary["rows"]:
        for each in row["requests"]:
            assert 0 <= each["arrival_s"] <= each["first_s"] <= each["end_s"] <= row["wall_s"] * 3
        assert row["first_token_s"]["p50"] <= row["first_token_s"]["p90"] <= row["first_token_s"]["p99"]


def test_the_trace_is_one_of_any_bench_with_the_passes_beside_it(chat):
    summary, trace = chat
    lines = list(read_trace(trace))
    assert lines[-1]["type"] == "end"
    outputs = [line for line in lines if line["type"] == "output"]
    assert len(outputs) == 4 * 6
    steps = [line for line in lines if line["type"] == "step" and line["method"].startswith("paged")]
    assert sum(len(line["tokens"]) for line in steps) == 60
    passes = [line for line in lines if line["type"] == "pass"]
    assert len(passes) == len(row_of(summary, "paged")["kv"]["passes"]["time_s"])
    assert sum(row["num_emitted"] for line in passes for row in line["rows"]) == 60


def test_a_shared_prefix_is_found_and_seen_in_the_cache(bench):
    engines = ["paged", "paged:prefix_sharing=false"]
    summary = bench("prefix:n=4,tokens=120", engines=engines, max_rows=[4], max_new_tokens=6)
    shared, apart = (row_of(summary, name) for name in engines)
    assert apart["prefix_hit_rate"] == 0
    prompts = summary["workload"]["prompt_tokens"]
    assert 3 * 112 / sum(prompts) <= shared["prefix_hit_rate"] <= 3 * 150 / sum(prompts)
    assert max(shared["kv"]["passes"]["slots"]) < max(apart["kv"]["passes"]["slots"])
    root = shared["kv"]["snapshot"]["prefixes"][0]
    assert root["num_holders"] == 5
    assert root["num_tokens"] >= 112
    assert apart["kv"]["snapshot"]["prefixes"] == []
    assert shared["kv"]["tokens_per_slot"] > 1 > apart["kv"]["tokens_per_slot"]


def test_samples_match_ours_and_are_not_compared_with_others_noise(bench):
    summary = bench("samples:n=3", engines=["paged", "ragged", "hf"], max_rows=[3])
    assert [row["match"]["identical"] for row in summary["rows"]] == [3, 3, 0]
    assert summary["rows"][2]["match"]["compared_with"] is None


def test_requests_are_served_when_they_arrive(bench):
    summary = bench("poisson:20,n=4", engines=["paged", "ragged", "hf", "hf-batch"], max_rows=[2])
    arrivals = [[each["arrival_s"] for each in row["requests"]] for row in summary["rows"]]
    assert arrivals[0] == sorted(arrivals[0])
    for row, times in zip(summary["rows"], arrivals, strict=True):
        assert times == pytest.approx(arrivals[0], abs=1e-9), "the same ones for all engines"
        assert all(each["first_s"] > each["arrival_s"] > 0 for each in row["requests"])
        assert row["match"]["identical"] == 4


def test_a_small_cache_preempts_and_changes_nothing(bench):
    one = 16 * 2 * 2 * 2 * 8 * 4  # bytes of a block: two layers, keys and values, two heads of 8, float32
    summary = bench(
        "samples:n=4", engines=["paged:prefix_sharing=false"], max_rows=[4], kv_memory=str(40 * one), max_new_tokens=60
    )
    (row,) = summary["rows"]
    assert row["preemptions"] > 0
    assert row["match"]["identical"] == 4


def test_use_of_slots_by_hand():
    """Two rows that share block 3; four slots a block."""
    rows = (RowRecord("a", 5, 7, 6, (3, 4, 9), 1, 0, 0), RowRecord("b", 5, 5, 4, (3, 5), 1, 0, 0))
    used = slots_of_pass(PassRecord(rows, 2, 6, 1, 0, None), 4, 20)
    assert used == {
        "rows": 2, "waiting": 2, "emitted": 2, "held": 6, "known": 1,
        "tokens": 10, "filled": 6, "slots": 12, "pass_slots": 16, "padded": 12, "reserved": 40,
    }  # fmt: skip


def test_batches_take_what_has_arrived():
    requests = [Request(str(i), (), 1, arrival_s=at) for i, at in enumerate((0.0, 0.0, 0.05, 0.0))]
    batches = []

    def serve(batch: list[Asked], run: Run) -> None:
        batches.append([each.id for each in batch])
        for each in batch:
            run.served[each.id] = Served(0.0, (1,), [0.0])

    in_batches([Asked(request, (1,)) for request in requests], 2, serve)
    assert batches == [["0", "1"], ["3"], ["2"]]


def test_an_answer_that_transformers_lost_ends_the_run():
    """It tells of errors in the result only, or not at all."""
    engine = HfContinuous(parse_engine("hf-batch"), 2, None, frozenset())
    for result in (
        SimpleNamespace(error="no room", generated_tokens=[1]),
        SimpleNamespace(error=None, generated_tokens=[]),
    ):
        result.request_id = "a"
        with pytest.raises(RuntimeError, match="failed on a"):
            engine._take(result, Queue([]))


# ----- the command -----


@pytest.fixture
def command(monkeypatch, capsys, target):
    run = tinychat.Command(monkeypatch, capsys)
    return lambda *words: run("bench", "--target", target, "--max-new-tokens", "6", "--threads", "1", *words)


def test_the_command_prints_a_table_and_writes_the_result(command, tmp_path):
    output = tmp_path / "w.json"
    ran = command(
        "--workload", "ragged:n=3", "--engine", "paged", "--engine", "hf", "--max-rows", "2", "--drafter", "none",
        "--drafter", "ngram", "--output", str(output),
    )  # fmt: skip
    assert ran.status == 0, ran.err
    written = json.loads(output.read_text())
    assert written["kind"] == "workload"
    assert [row["drafter"] for row in written["rows"]] == ["none", "ngram", None]
    assert written["provenance"]["settings"]["max_rows"] == [2]
    for words in ("paged + ngram", "3/3", "of the cache's slots held a token"):
        assert words in ran.out


class Corrupting(MatchVerifier):
    """Wrong on purpose: emits another token than the target's."""

    def verify(self, tree, target, rng):
        verdict = MatchVerifier.verify(self, tree, target, rng)
        return Verdict(verdict.nodes, (*verdict.tokens[:-1], (verdict.tokens[-1] + 1) % 200))


def test_wrong_tokens_are_found(command, monkeypatch):
    monkeypatch.setattr("specdec.serving.engine.as_verifier", lambda _: Corrupting())
    monkeypatch.setattr("specdec.runtime.as_verifier", lambda _: Corrupting())
    ran = command("--workload", "ragged:n=2", "--engine", "paged", "--drafter", "none")
    assert ran.status == 1
    assert "UNEXPLAINED" in ran.out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--engine", "paged"], "belong to a workload"),
        (["--workload", "poisson"], "needs a rate"),
        (["--workload", "ragged", "--engine", "nosuch"], "there is no engine 'nosuch'"),
        (["--workload", "ragged", "--engine", "paged:nosuch=1"], "has no option 'nosuch'"),
        (["--workload", "ragged", "--engine", "paged:prefix_sharing=1"], "true or false"),
        (["--workload", "ragged", "--max-rows", "0"], "at least 1"),
        (["--workload", "ragged", "--batch-size", "2"], "--batch-size does not go with --workload"),
        (["--workload", "prefix:n=1,tokens=5000"], "context"),
    ],
)
def test_bad_input_is_told_in_one_line(command, words, complaint):
    ran = command(*words)
    assert ran.status == 2
    assert complaint in ran.error


def test_engine_options_have_kinds():
    spec = parse_engine("paged:block_size=32,prefix_sharing=False")
    assert (spec.option("block_size"), spec.option("prefix_sharing"), spec.option("token_budget")) == (32, False, 512)
