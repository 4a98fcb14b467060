"""The measuring library: all methods get the same prompts, one counter counts, and an interrupted run keeps its part."""

from __future__ import annotations

import json
import sys
import types

import pytest
import tinychat
import torch
from tinychat import QUESTIONS, VOCAB
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from specdec.cli.bench_config import BenchConfig
from specdec.cli.benchmark import run_bench
from specdec.cli.loading import load
from specdec.cli.measure import Batch, HfGenerate, neutral_generation, up_to_end
from specdec.cli.options import Engine
from specdec.cli.summary import summarise
from specdec.drafters import DRAFTERS
from specdec.drafters.ngram import NgramDrafter
from specdec.errors import UnsupportedModelError
from specdec.records.prompts import load_prompts, render_turns
from specdec.records.trace import read_trace

METHODS = ["hf-generate", "hf-prompt-lookup", "plain", "ngram"]
NUMBERS = {
    "speedup",
    "speedup_low",
    "speedup_high",
    "tokens_per_s",
    "mean_acceptance_length",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
    "accepted_per_pos",
    "draft_s",
    "score_s",
    "verify_s",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tinychat.save(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return tinychat.write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", QUESTIONS)


@pytest.fixture(scope="module")
def bench(target, prompts):
    """Run a bench on the tiny model; options as of BenchConfig."""

    def run(**options):
        given = {"target": target, "prompts": prompts, "max_new_tokens": 12, "threads": 1, "adaptive": False, **options}
        if not given.get("drafter_models"):
            given.setdefault("drafters", ("ngram",))
        return run_bench(BenchConfig(**given))

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def greedy(bench):
    return bench()


@pytest.fixture(scope="module")
def sampled(bench):
    return bench(temperature=1.0)


def tokens_of(results, name):
    """(question, turn) -> what the method emitted."""
    method = next(m for m in results.methods if m.name == name)
    return {
        (question.number, i): tokens
        for group in results.groups
        for i, turn in enumerate(group.turns)
        for question, tokens in zip(turn.questions, turn.outputs[method].tokens, strict=True)
    }


def rows_of(results):
    return {row["drafter"] or row["method"]: row for row in summarise(results)["rows"]}


def register(monkeypatch, name, drafter):
    """Let ``drafter`` be found under ``name``, as another package's would be."""
    module = types.ModuleType(f"drafter_{name}")
    module.build = lambda _context: drafter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(DRAFTERS, name, module.__name__)


def test_the_summary_has_the_documented_form(greedy):
    """docs/bench.md promises these keys; analysis and the project's checks read them."""
    summary = summarise(greedy)
    assert summary["schema"] == 1
    assert summary["partial"] is False
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {"command", "versions", "machine", "commit", "date", "dtype", "threads"} <= set(summary["provenance"])
    assert summary["provenance"]["dtype"] == "float32"
    assert [row["method"] for row in summary["rows"]] == METHODS
    for row in summary["rows"]:
        assert {"method", "drafter", "verifier", "lossless", "match", "categories"} | NUMBERS <= set(row)
        assert {"identical", "total", "explained", "unexplained"} <= set(row["match"])
        assert list(row["categories"]) == ["chat", "code", "prompt"]
        for category in row["categories"].values():
            assert set(row) - {"categories"} == set(category)
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        for total in ("num_tokens", "num_drafts", "num_accepted_tokens", "num_outputs", "num_prompts"):
            assert row[total] == sum(category[total] for category in row["categories"].values())
    baseline = summary["rows"][0]
    assert (baseline["speedup"], baseline["speedup_low"], baseline["speedup_high"]) == (1, 1, 1)


def test_greedy_outputs_of_all_methods_are_identical(greedy):
    for name, row in rows_of(greedy).items():
        match = row["match"]
        expected = 0 if name == "hf-generate" else 5
        assert (match["identical"], match["total"], match["explained"], match["unexplained"]) == (
            expected,
            expected,
            0,
            0,
        )
        assert tokens_of(greedy, name) == tokens_of(greedy, "hf-generate")


def test_acceptance_is_counted_alike_for_all_methods(greedy):
    """Tokens = the target's own (one a pass) + accepted ones, for transformers' methods seen from outside."""
    rows = rows_of(greedy)
    for row in rows.values():
        assert row["num_tokens"] == row["num_drafts"] + row["num_accepted_tokens"]
        assert row["mean_acceptance_length"] == pytest.approx(row["num_tokens"] / row["num_drafts"])
        assert sum(row["accepted_per_pos"]) == row["num_accepted_tokens"]
    assert rows["plain"]["num_drafts"] == rows["hf-generate"]["num_drafts"] == rows["plain"]["num_tokens"]
    assert rows["ngram"]["num_draft_tokens"] >= rows["ngram"]["num_accepted_tokens"] > 0


def test_seconds_add_up(greedy):
    for row in rows_of(greedy).values():
        assert 0 < row["prefill_s"] <= row["wall_s"]
        if row["verifier"]:
            assert row["draft_s"] + row["score_s"] + row["verify_s"] <= row["wall_s"]
            assert row["model_s"] <= row["score_s"] + row["draft_s"]
            assert row["host_s"] == pytest.approx(row["wall_s"] - row["model_s"])


def test_later_turns_see_the_baselines_answers_in_every_method(greedy, target, prompts):
    """Each method answering its own answers would time different prompts."""
    results = greedy
    tokenizer = load(target, (), Engine(device="cpu")).tokenizer
    first, second = results.groups[0].turns
    (answer,) = first.outputs[results.methods[0]].tokens
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert list(second.batch.prompts[0]) == render_turns(tokenizer, load_prompts(prompts)[0], [text])
    assert len(second.outputs) == len(METHODS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_do_not_depend_on_the_batch(bench, greedy, sampled, temperature):
    """Rows of a batch have other lengths and end at other times; noise belongs to the question."""
    single, batched = sampled if temperature else greedy, bench(temperature=temperature, batch_size=3)
    assert [len(group.questions) for group in batched.groups] == [3, 1]
    assert [len(turn.questions) for turn in batched.groups[0].turns] == [3, 1], "one question has a second turn"
    assert [skipped["method"] for skipped in batched.skipped] == ["hf-prompt-lookup"]
    firsts = {key: ids for key, ids in tokens_of(single, "ngram").items() if key[1] == 0}
    assert firsts == {key: ids for key, ids in tokens_of(batched, "ngram").items() if key[1] == 0}
    assert all(row["match"]["unexplained"] == 0 for row in rows_of(batched).values())


def test_sampled_outputs_are_compared_with_plain_decoding(sampled):
    """transformers samples with other noise: only our own loop can be token-identical."""
    rows = rows_of(sampled)
    assert (rows["ngram"]["match"]["identical"], rows["ngram"]["match"]["total"]) == (5, 5)
    assert rows["ngram"]["match"]["compared_with"] == "plain"
    assert all(rows[name]["match"]["total"] == 0 for name in ("hf-generate", "hf-prompt-lookup", "plain"))
    assert tokens_of(sampled, "plain") != tokens_of(sampled, "hf-generate")


def test_a_rule_that_keeps_only_the_distribution_is_not_compared(bench):
    row = rows_of(bench(temperature=1.0, verifier="rejection", limit=2))["ngram"]
    assert (row["match"]["total"], row["match"]["compared_with"], row["lossless"]) == (0, None, True)


def test_sizing_drafts_by_the_clock_changes_no_token(bench, greedy, sampled):
    """The adaptive budget is the default; it may only decide how much is drafted."""
    assert tokens_of(bench(adaptive=True), "ngram") == tokens_of(greedy, "ngram")
    assert tokens_of(bench(adaptive=True, temperature=1.0), "ngram") == tokens_of(sampled, "ngram")


def test_a_lossy_rule_does_not_touch_plain_decoding(bench, sampled):
    """Plain decoding is what others are compared with."""
    results = bench(temperature=1.0, verifier="typical")
    rows = rows_of(results)
    assert (rows["plain"]["lossless"], rows["ngram"]["lossless"]) == (True, False)
    assert tokens_of(results, "plain") == tokens_of(sampled, "plain")
    assert rows["ngram"]["match"]["total"] == 0


def test_a_run_is_reproducible(bench, sampled):
    again = bench(temperature=1.0)
    for name in METHODS:
        assert tokens_of(sampled, name) == tokens_of(again, name)
    assert tokens_of(sampled, "ngram") != tokens_of(bench(temperature=1.0, seed=4), "ngram")


def test_a_bench_leaves_torchs_random_state_alone(bench):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bench(temperature=1.0, limit=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_draft_model_is_measured_by_transformers_too(bench, target):
    results = bench(drafter_models=(target,), limit=2, max_new_tokens=8)
    rows = rows_of(results)
    assert list(rows) == ["hf-generate", "hf-prompt-lookup", "hf-assisted", "plain", "model"]
    assert rows["model"]["mean_acceptance_length"] > 1, "the target drafts for itself"
    assert rows["model"]["model_s"] > rows["model"]["score_s"] * 0.5
    assert all(row["match"]["unexplained"] == 0 for row in rows.values())


def test_a_draft_model_with_another_vocabulary_is_refused(bench, tmp_path):
    other = tinychat.save(tmp_path, tinychat.make_model(vocab=VOCAB + 5))
    with pytest.raises(UnsupportedModelError, match="do not share a tokenizer"):
        bench(drafter_models=(other,), drafters=("ngram",))


def test_a_draft_model_whose_tokenizer_means_other_tokens_is_refused(bench, tmp_path):
    """Two vocabularies of the same size need not be the same; the drafts would be noise without a word."""
    tokenizer = tinychat.make_tokenizer()
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    letters = list(inner["model"]["vocab"])
    inner["model"]["vocab"] = {letter: i for i, letter in enumerate(reversed(letters))}
    shuffled = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(inner)), eos_token="<eos>")
    other = tinychat.save(tmp_path, tokenizer=shuffled)
    with pytest.raises(UnsupportedModelError, match="do not share a vocabulary"):
        bench(drafter_models=(other,), drafters=("model",))


def test_drafters_with_other_options_are_told_apart(bench):
    results = bench(drafters=("ngram", "ngram:max_order=2", "ngram", "none"), limit=1)
    assert [(row["method"], row["drafter"]) for row in summarise(results)["rows"]][3:] == [
        ("ngram", "ngram"),
        ("ngram", "ngram:max_order=2"),
    ]


def test_a_bench_names_the_drafter_that_auto_stands_for(bench):
    results = bench(drafters=("auto", "hybrid", "auto:parts=ngram+recycling"), limit=1)
    rows = [(row["method"], row["drafter"]) for row in summarise(results)["rows"]]
    assert rows[3:] == [("hybrid", "hybrid"), ("hybrid", "hybrid:parts=ngram+recycling")]
    assert results.provenance["settings"]["drafters"] == ["hybrid", "hybrid:parts=ngram+recycling"]


def test_the_order_of_methods_rotates(greedy):
    """Whoever always runs behind the same method would inherit its caches."""
    results = greedy
    firsts = [next(iter(turn.outputs)).name for group in results.groups for turn in group.turns]
    assert firsts == [*METHODS, METHODS[0]]


def test_what_is_counted_ends_with_the_first_end_of_text():
    assert up_to_end([1, 2, 9, 3, 9], frozenset({9})) == (1, 2, 9)
    assert up_to_end([1, 2], frozenset({9})) == (1, 2)
    assert up_to_end([1, 8, 9], frozenset({8, 9})) == (1, 8)


def test_a_models_own_generation_settings_change_neither_baseline_nor_method(bench, tmp_path):
    """A repetition penalty in generation_config.json would make generate() decode from another distribution than us."""
    model = tinychat.make_model()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = list(range(100))
    target = tinychat.save(tmp_path, model)
    results = bench(target=target, limit=2)
    assert all(row["match"]["unexplained"] == 0 for row in rows_of(results).values())
    plain = bench(limit=2)
    assert tokens_of(results, "hf-generate") == tokens_of(plain, "hf-generate")


def test_the_models_generation_config_is_put_back():
    model = tinychat.make_model()
    own = model.generation_config
    with neutral_generation(model, frozenset({256})):
        assert model.generation_config is not own
    assert model.generation_config is own


def test_time_to_the_first_tokens_is_that_of_the_first_pass():
    """A clock that ticks once a look: the streamer looks when the first token comes, not when the prompt goes in."""
    ticks = iter(range(100))
    method = HfGenerate("hf-generate", tinychat.make_model(), frozenset(), 0.0, 0, clock=lambda: float(next(ticks)))
    output = method.run(Batch(((1, 2, 3), (4, 5)), (0, 1), 5))
    assert (output.first_s, output.total_s, output.num_first, output.num_tokens) == (1.0, 2.0, 2, 10)


class Interrupting(NgramDrafter):
    """Raises KeyboardInterrupt, as Ctrl-C does, when it is asked for the given row."""

    def propose(self, rows, limits, params, rng):
        if any(row.key == 2 for row in rows):
            raise KeyboardInterrupt
        return super().propose(rows, limits, params, rng)


def test_an_interrupted_run_keeps_what_every_method_had_finished(bench, monkeypatch, tmp_path):
    register(monkeypatch, "interrupting", Interrupting())
    results = bench(drafters=("interrupting",), trace=tmp_path / "t.jsonl")
    assert results.is_partial
    summary = summarise(results)
    assert summary["partial"] is True
    assert {row["num_prompts"] for row in summary["rows"]} == {2}
    kinds = [line["type"] for line in read_trace(tmp_path / "t.jsonl")]
    assert kinds[-1] == "warning"
    assert "end" not in kinds


def test_a_run_interrupted_at_once_is_still_a_result(bench, monkeypatch):
    class AtOnce(NgramDrafter):
        def begin(self, rows):
            raise KeyboardInterrupt

    register(monkeypatch, "at_once", AtOnce())
    summary = summarise(bench(drafters=("at_once",)))
    assert (summary["partial"], summary["rows"]) == (True, [])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_trace_holds_enough_to_recompute_the_result(bench, tmp_path, batch_size):
    results = bench(trace=tmp_path / "t.jsonl", batch_size=batch_size)
    lines = list(read_trace(tmp_path / "t.jsonl"))
    assert lines[-1]["type"] == "end"
    assert lines[0]["dtype"] == "float32"
    for name, row in rows_of(results).items():
        outputs = [line for line in lines if line["type"] == "output" and line["method"] == name]
        steps = [line for line in lines if line["type"] == "step" and line["method"] == name]
        walls = {(line["group"], line["turn"]): line["wall_s"] for line in outputs}
        assert sum(line["num_tokens"] for line in outputs) == row["num_tokens"]
        assert sum(walls.values()) == pytest.approx(row["wall_s"])
        if row["verifier"]:
            assert len(steps) == row["num_drafts"]
            assert sum(line["num_accepted"] for line in steps) == row["num_accepted_tokens"]
            # Row keys are question numbers, so the steps of one turn are told apart by labels.
            emitted = {}
            for line in steps:
                emitted.setdefault((line["question_id"], line["turn"]), []).extend(line["tokens"])
            assert emitted == {(line["question_id"], line["turn"]): line["token_ids"] for line in outputs}
    assert {line["question_id"] for line in lines if "question_id" in line} == {"7", "8", "nine", "4"}


def test_sums_of_categories_hold_in_mixed_batches(bench):
    row = rows_of(bench(batch_size=4))["ngram"]
    for name in ("wall_s", "prefill_s", "model_s", "num_draft_tokens"):
        assert row[name] == pytest.approx(sum(category[name] for category in row["categories"].values()))
