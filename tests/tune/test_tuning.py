"""The tuner: what it measures, predicts and races, its file, and who takes it. A tiny model; nothing is timed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tinychat
import torch

import specdec
from specdec.cli.synthetic import parse_acceptance, synthetic_pair
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.trees.shapes import read_shape, sequoia
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import Limit, Row
from specdec.records.tuned import fingerprint, load_tuned
from specdec.rng import PhiloxRng
from specdec.runtime import Runtime
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import TokenTree
from specdec.tune import tuning
from specdec.tune.prediction import Candidate, predict
from specdec.tune.recording import NONE, Record, record
from specdec.tune.setting import Answer, Draft, Pass, Setting, measure_curve
from specdec.tune.tuning import finalists, race
from specdec.verifiers import make_verifier

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6, 5, 6, 5, 6], [9, 8, 7], [4, 4, 4, 4]]


@pytest.fixture
def specdec_command(monkeypatch, capsys):
    return tinychat.Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tinychat.save(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def tuned_file(target, tmp_path_factory):
    """A real file, made by the command itself."""
    from specdec.cli.main import app

    folder = tmp_path_factory.mktemp("tuned")
    prompts = tinychat.write_prompts(folder / "p.jsonl", tinychat.QUESTIONS[:3])
    path = folder / "tuned.json"
    words = ["tune", "--target", target, "--drafter", "ngram", "--prompts", prompts, "--max-new-tokens", "8"]
    words += ["--batch-size", "1,2", "--max-nodes", "4", "--output", str(path)]
    app(words, standalone_mode=False)
    return path


def setting(seconds=None, **options):
    """With ``seconds``: a clock that moves by them at each look."""
    now = [0.0]

    def clock():
        now[0] += seconds
        return now[0]

    common = (Runtime(tinychat.make_model(eos=None)), make_verifier("match"), SamplingParams(0.0), frozenset(), 12)
    return Setting(*common, **({"clock": clock} if seconds else {}), **options)


CHAIN = TokenTree((1, 2, 3, 4, 5), (-1, 0, 1, 2, 3), estimates=(1.0, 0.8, 0.6, 0.5, 0.4))
ROOT = TokenTree.root(1)


def recorded(spec, passes, first_s=0.0):
    """One answer, whose prompt's pass takes ``first_s`` and yields a token."""
    return Record(spec, [Answer([5], [Pass([Draft(ROOT, frozenset({0}))], first_s), *passes])])


def chain(*accepted_of, estimates=True, pass_s=1.0):
    """A draft of one chain of four for each entry, of which so many tokens were accepted; drafting takes 0.001 s."""
    tree = CHAIN if estimates else TokenTree(CHAIN.tokens, CHAIN.parents)
    return [Pass([Draft(tree, frozenset(range(n + 1)))], pass_s + 0.001, 0.001) for n in accepted_of]


def plain(num_steps=100, step_s=1.0, first_s=0.0):
    """Plain decoding, one row."""
    return recorded(NONE, [Pass([Draft(ROOT, frozenset({0}))], step_s) for _ in range(num_steps)], first_s)


def test_the_cost_curve_has_every_size_and_leaves_no_rows_behind():
    s = setting(seconds=0.5)
    curve = measure_curve(s, PROMPTS[:2], columns=(1, 2, 5), rounds=3)
    assert curve == {1: 0.5, 2: 0.5, 5: 0.5}
    assert not s.engine._rows


def test_acceptance_is_counted_by_depth_and_rank():
    tree = TokenTree((0, 1, 2, 3), (-1, 0, 0, 1))
    steps = [
        Pass([Draft(tree, frozenset(nodes))]) for nodes in ([(0, 1, 3)] * 5 + [(0, 1)] * 5 + [(0, 2)] * 5 + [(0,)] * 5)
    ]
    assert recorded("ngram", steps).acceptance_table() == [[0.5, 0.25], [0.5]]


def test_prediction_is_tokens_over_costs():
    """Four right of four, free columns: five tokens a step. Costly columns: none is worth it."""
    right = recorded("ngram", chain(*[4] * 20))
    free = predict(plain(), [right], {1: 1.0, 32: 1.0}, 1, 4)
    assert free[0].max_nodes == 4
    assert free[0].predicted_decode == pytest.approx(5 / 1.001)
    wrong = recorded("ngram", chain(*[0] * 50, pass_s=5.0))
    costly = predict(plain(), [wrong], {1: 1.0, 2: 2.0}, 1, 4)
    fixed = {c.max_nodes: c.predicted_decode for c in costly if not c.adaptive and c.drafter != NONE}
    assert fixed[1] == pytest.approx(0.5, abs=0.01)
    assert costly[0].predicted == 1.0


def test_prediction_keeps_the_nodes_that_a_smaller_size_would_keep():
    mixed = predict(plain(), [recorded("ngram", chain(2, 2, 4, 0))], {1: 1.0, 32: 1.0}, 1, 4)
    found = {c.max_nodes: c.predicted_decode for c in mixed if not c.adaptive}
    assert found[1] == pytest.approx(1.75, abs=0.01)
    assert found[4] == pytest.approx(3.0, abs=0.01)


def test_a_models_chain_is_drafted_no_longer_than_its_size():
    each = recorded("model:num_tokens=4", chain(1, 1, 1, estimates=False))
    names = {c.max_nodes: c.drafter for c in predict(plain(), [each], {1: 1.0}, 1, 8) if not c.adaptive}
    assert names[2] == "model:num_tokens=2"
    assert names[8] == "model:num_tokens=4"


def test_no_speculation_is_always_a_finalist():
    many = [Candidate("ngram", n, False, 2.0 - n / 10) for n in range(1, 9)] + [Candidate(NONE, 0, False, 1.0)]
    chosen = finalists(many, 4)
    assert chosen[0].drafter == NONE
    assert [c.max_nodes for c in chosen[1:]] == [1], "one of a kind"
    pair = [Candidate("a", n, n == 3, 3.0 - n / 10) for n in (1, 2, 3)] + [Candidate("b:x=1", 8, False, 1.5)]
    assert [(c.drafter, c.max_nodes) for c in finalists([*pair, many[-1]], 5)][1:] == [("a", 1), ("a", 3), ("b:x=1", 8)]


def test_of_nearly_equal_racers_the_adaptive_one_is_taken() -> None:
    fixed, adaptive = Candidate("a", 4, False, 2.0), Candidate("a", 8, True, 2.0)
    fixed.measured, adaptive.measured = (2.0, 1.9, 2.1), (1.96, 1.8, 2.1)
    assert max((fixed, adaptive), key=tuning._merit) is adaptive
    adaptive.measured = (1.9, 1.8, 2.0)
    assert max((fixed, adaptive), key=tuning._merit) is fixed


def test_the_race_drops_what_is_surely_slower_and_returns_the_fastest():
    """The clock counts looks: a step that drafts emits more tokens for as many looks."""
    s = setting(seconds=1.0)
    racers = [Candidate(NONE, 0, False, 1.0), Candidate("ngram", 8, False, 2.0)]
    best = race(s, racers, [[p] for p in PROMPTS * 2], {1: 1.0, 2: 1.0})
    assert best.measured is not None
    assert racers[0].measured == (1.0, 1.0, 1.0)
    assert best.measured[0] == max(r.measured[0] for r in racers)
    assert not racers[0].is_dropped


def test_a_recording_sees_every_step_but_the_prompts():
    s = setting(seconds=1.0)
    base, found = record(s, ["ngram"], [[PROMPTS[0]], [PROMPTS[1]]], 8)
    assert found.steps
    assert all(len(step.drafts) == 1 for step in found.steps)
    assert [sum(p.num_tokens for p in a.passes) for a in found.answers] == [12, 12]
    assert len(base.steps) == 22
    assert predict(base, [found], {1: 1.0, 32: 2.0}, 1, 8)[-1].predicted > 0


class Machine:
    """A clock that a real target moves: a pass takes its columns and its prompt, drafting and observing take their own."""

    COLUMN_S, PROMPT_S, DRAFT_S, OBSERVE_S = 0.05, 0.4, 0.1, 0.2

    def __init__(self, monkeypatch):
        self.now = 0.0
        self._wrap(monkeypatch, CausalLM, "score", self.pass_s)
        self._wrap(monkeypatch, NgramDrafter, "propose", lambda *_: self.DRAFT_S)
        self._wrap(monkeypatch, NgramDrafter, "observe", lambda *_: self.OBSERVE_S)

    def __call__(self):
        return self.now

    def pass_s(self, _, rows, trees):
        prompt_s = sum(self.PROMPT_S * row.num_prompt for row in rows if row.num_steps == 0)
        return 1.0 + prompt_s + self.COLUMN_S * (max(map(len, trees)) - 1)

    def _wrap(self, monkeypatch, kind, name, seconds):
        inside = getattr(kind, name)

        def method(*args):
            self.now += seconds(*args)
            return inside(*args)

        monkeypatch.setattr(kind, name, method)


def test_prediction_and_race_measure_the_same_quantity(monkeypatch):
    """Guards speedups of 2.7 predicted and 1.9 measured: the prompt's pass, the time that a drafter takes to observe,
    steps that end an answer, and other prompts were on one side only."""
    s = replace(setting(), clock=Machine(monkeypatch), max_new_tokens=40)
    batches = [[prompt] for prompt in PROMPTS]
    curve = measure_curve(s, batches[0], rounds=3)
    assert curve[4] == pytest.approx(1.15)
    base, found = record(s, ["ngram"], batches, 8)
    candidates = predict(base, [found], curve, 1, 8)
    racers = [c for c in candidates if c.adaptive or c.max_nodes in (0, 1, 4, 8)]
    racers.sort(key=lambda c: c.drafter != NONE)
    race(s, racers, batches, curve)
    for each in racers:
        rel = 0.02 if each.max_nodes == 8 and not each.adaptive else 0.15  # as it was recorded; or replayed
        assert each.predicted == pytest.approx(each.measured[0], rel=rel), str(each)
        assert each.predicted_decode == pytest.approx(each.measured_decode[0], rel=rel), str(each)


def test_the_prompts_pass_is_in_whole_answers_only():
    right = recorded("ngram", chain(*[4] * 20), first_s=100.0)
    best = predict(plain(first_s=100.0), [right], {1: 1.0, 32: 1.0}, 1, 4)[0]
    assert best.predicted_decode == pytest.approx(5 / 1.001)
    assert best.predicted == pytest.approx(200 / 120.02)


def test_what_a_step_takes_beyond_its_pass_is_part_of_the_prediction():
    """Whatever it is: drafting, observing, the verdict, the loop."""
    slow = recorded("ngram", [Pass(p.drafts, 2.5) for p in chain(*[4] * 20)])
    found = predict(plain(step_s=1.5), [slow], {1: 1.0, 5: 1.4, 32: 1.4}, 1, 4)
    assert next(c for c in found if c.max_nodes == 4 and not c.adaptive).predicted_decode == pytest.approx(
        5 * 1.5 / 2.5
    )


def test_a_batch_is_predicted_with_the_rows_that_it_still_has():
    """Guards means over rows: of two rows one ends early, and what is left of the batch yields one row's tokens."""
    both = [Pass([Draft(CHAIN, frozenset(range(5)), row) for row in (0, 1)], 2.0) for _ in range(3)]
    one = [Pass([Draft(CHAIN, frozenset({0}), 1)], 1.0) for _ in range(9)]
    first = Pass([Draft(ROOT, frozenset({0}), row) for row in (0, 1)], 0.0)
    base = Pass([Draft(ROOT, frozenset({0}), row) for row in (0, 1)], 2.0)
    plain_two = Record(NONE, [Answer([5, 5], [first, *[base] * 20])])
    found = predict(plain_two, [Record("ngram", [Answer([5, 5], [first, *both, *one])])], {1: 2.0, 32: 2.0}, 2, 4)
    assert next(c for c in found if c.max_nodes == 4 and not c.adaptive).predicted_decode == pytest.approx(
        (30 + 9) / 15
    )


def test_a_race_that_is_cut_short_is_compared_with_predictions_for_its_own_prompts():
    s = setting(seconds=1.0)
    racers = [Candidate(NONE, 0, False, 1.0), Candidate("ngram", 8, False, 3.0, ratios=[(2.0, 4.0), (4.5, 9.0)])]
    race(s, racers, [[p] for p in PROMPTS], {1: 1.0, 2: 1.0}, is_over=lambda: True)
    assert (racers[1].predicted, racers[1].predicted_decode) == pytest.approx((2.0, 4.0))


def test_an_older_file_has_no_speedups_of_decoding_alone(tuned_file, tmp_path):
    content = json.loads(tuned_file.read_text())
    for entry in content["per_batch_size"].values():
        del entry["predicted_decode"], entry["measured_decode"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(content))
    entry = load_tuned(path).nearest(1)
    assert entry.measured is not None
    assert (entry.predicted_decode, entry.measured_decode) == (None, None)


def test_the_command_writes_what_the_documentation_says(tuned_file, target):
    written = json.loads(tuned_file.read_text())
    assert (written["schema"], written["kind"], written["target"]) == (1, "tuned", target)
    assert set(written["per_batch_size"]) == {"1", "2"}
    for entry in written["per_batch_size"].values():
        assert set(entry) >= {
            "drafter",
            "max_nodes",
            "adaptive",
            "predicted",
            "measured",
            "predicted_decode",
            "measured_decode",
            "cost_curve",
            "acceptance_table",
        }
        assert any(c["drafter"] == NONE and c["measured"] for c in entry["candidates"])
    tuned = load_tuned(tuned_file)
    assert tuned.nearest(1).batch_size == 1
    assert tuned.nearest(7).batch_size == 2
    assert tuned.costs().knows(2, 16)


def with_entry(tuned_file, path, **changes):
    content = json.loads(tuned_file.read_text())
    for entry in content["per_batch_size"].values():
        entry.update(changes)
    path.write_text(json.dumps(content))
    return path


def test_the_library_takes_the_file_as_a_drafter(tuned_file, target, tmp_path):
    path = with_entry(tuned_file, tmp_path / "t.json", drafter="ngram", max_nodes=3, adaptive=False)
    model = specdec.load_model(target)
    ids = torch.tensor([PROMPTS[0]])
    steps = []
    common = {"max_new_tokens": 12, "do_sample": False}
    got = specdec.generate(model, ids, drafter=str(path), on_step=steps.append, **common)
    assert torch.equal(got, model.generate(ids, **common))
    assert max(step.num_drafted for step in steps) <= 3


def test_a_drafter_takes_its_tree_from_the_file(specdec_command, tuned_file, target, tmp_path):
    """Guards a reader of another format than the one that is written; the shape is read by name, as a user writes it."""
    prompts, measured = tinychat.write_prompts(tmp_path / "p.jsonl", tinychat.QUESTIONS[:3]), tmp_path / "measured.json"
    words = ["--target", target, "--drafter-model", target, "--drafter", "model:shape=2x1", "--prompts", prompts]
    words += ["--max-new-tokens", "16", "--max-nodes", "4", "--output", str(measured)]
    assert specdec_command("tune", *words).status == 0
    written = load_tuned(measured).entries[0].acceptance_table
    assert written, "the command has measured something"
    assert read_shape(str(measured), 6) == sequoia(written, 6)
    table = [[0.6, 0.2, 0.1], [0.5, 0.2]]
    path = with_entry(tuned_file, tmp_path / "my tree.json", acceptance_table=table)
    model, ids = specdec.load_model(target, dtype="float32", device="cpu"), torch.tensor([[5, 9, 12, 5, 9]])
    steps = []
    settings = {"max_new_tokens": 9, "do_sample": False}
    out = specdec.generate(
        model,
        ids,
        drafter=f"model:shape={path},nodes=5",
        draft_model=model,
        adaptive=False,
        on_step=steps.append,
        **settings,
    )
    assert torch.equal(out, model.generate(ids, **settings))
    assert steps[0].tree_parents == sequoia(table, 5).parents
    with_entry(tuned_file, path, acceptance_table=[])
    with pytest.raises(ValueError, match="it has no acceptance table, because too few drafts were verified"):
        read_shape(str(path), 5)
    with_entry(tuned_file, path, acceptance_table=[[0.7, 0.7]])
    with pytest.raises(ValueError, match=r"my tree\.json holds no tree shape .*sum to at most 1"):
        read_shape(str(path), 5)


def test_a_path_object_is_a_tuned_file_whatever_its_name(tuned_file, target, tmp_path):
    model, ids = specdec.load_model(target, dtype="float32", device="cpu"), torch.tensor([[5, 9, 12, 5, 9]])
    for name in ("model:shape=3x2.json", "ngram", "no ending"):
        path = with_entry(tuned_file, tmp_path / name, drafter="ngram")
        out = specdec.generate(model, ids, drafter=path, max_new_tokens=6, do_sample=False)
        assert torch.equal(out, model.generate(ids, max_new_tokens=6, do_sample=False))


def test_a_file_of_another_model_warns_but_works(tuned_file, tmp_path):
    path = with_entry(tuned_file, tmp_path / "t.json", drafter="ngram")
    other = tinychat.make_model(vocab=300)
    with pytest.warns(UserWarning, match="was tuned for another model"):
        specdec.generate(other, torch.tensor([[1, 2, 3]]), drafter=str(path), max_new_tokens=3, do_sample=False)


def test_a_file_of_another_machine_or_dtype_says_so(tuned_file, target, tmp_path):
    model = specdec.load_model(target)
    assert load_tuned(tuned_file).warning(model) is None
    content = json.loads(tuned_file.read_text())
    content["provenance"]["machine"]["cpu"] = "abacus"
    content["provenance"]["dtype"] = "float16"
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    said = load_tuned(path).warning(model)
    assert "another dtype (float16; this is float32)" in said
    assert "another machine (abacus" in said
    assert content["fingerprint"] == fingerprint(model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a JSON file"),
        ("[]", "no tuned settings"),
        ('{"schema": 1, "rows": []}', "no tuned settings"),
        ('{"kind": "tuned", "schema": 9}', "schema 9, expected 1"),
        ('{"kind": "tuned", "schema": 1}', "damaged"),
        ('{"kind": "tuned", "schema": 1, "per_batch_size": {}}', "damaged"),
        ('{"kind": "tuned", "schema": 1, "per_batch_size": {"x": {}}}', "damaged"),
        (
            '{"kind": "tuned", "schema": 1, "per_batch_size": {"1": {"measured": null, "cost_curve": {"1": -1}}}}',
            "damaged",
        ),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_in_words(tmp_path, text, words):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_tuned(path)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"cannot read the tuned settings nowhere\.json .*specdec tune"):
        load_tuned("nowhere.json")


def test_bench_and_generate_take_the_file(specdec_command, tuned_file, target, tmp_path):
    path = with_entry(tuned_file, tmp_path / "t.json", drafter="ngram:max_order=2", max_nodes=3)
    prompts = tinychat.write_prompts(tmp_path / "p.jsonl", tinychat.QUESTIONS[1:3])
    common = ("--target", target, "--max-new-tokens", "6", "--config", str(path))
    ran = specdec_command("bench", "--prompts", prompts, *common)
    assert ran.status == 0
    assert "ngram:max_order=2" in ran.out
    assert "warning" not in ran.err
    assert specdec_command("generate", "abc", *common).status == 0
    broken = tmp_path / "b.json"
    broken.write_text("no")
    assert "not a JSON file" in specdec_command("generate", "abc", "--config", str(broken)).error


def test_trees_are_drawn_from_a_tuned_file(specdec_command, tuned_file, tmp_path):
    table = [[0.6, 0.2], [0.5]]
    path = with_entry(tuned_file, tmp_path / "t.json", acceptance_table=table)
    said = specdec_command("tune", "--show-tree", str(path)).out
    assert f"8 nodes with the root: {sequoia(table, 7).expected_tokens(table):.2f} tokens a step" in said
    assert "root\n  #1  0.600" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", "0"), "batch sizes are written 1,4,8"),
        (("--batch-size", "a"), "batch sizes are written 1,4,8"),
        (("--max-new-tokens", "1"), "max_new_tokens must be at least 2"),
        (("--limit", "0"), "limit must be at least 1"),
        (("--drafter", "nobody"), "no drafter is called 'nobody'"),
        (("--output", "/nowhere/t.json"), "cannot write --output"),
    ],
)
def test_bad_input_of_tune_is_told_in_one_line(specdec_command, target, words, said):
    ran = specdec_command("tune", "--target", target, *words)
    assert ran.status == 2
    assert said in ran.error


def test_synthetic_rates_are_met():
    """A mean of 2.5 tokens a step really is one: the standard error over 4000 steps is about 0.03."""
    drafter, verifier = synthetic_pair("mean=2.5", {0, 1})
    row = Row(0, [1, 2], 100)
    (tree,) = drafter.propose([row], [Limit(98, 16)], GREEDY, PhiloxRng(0))

    class Anything:
        is_greedy = True

        def best(self, node):
            return 0

    counts = [len(verifier.verify(tree, Anything(), PhiloxRng(0).at(0, i)).tokens) for i in range(4000)]
    assert sum(counts) / 4000 == pytest.approx(2.5, abs=0.15)
    assert 2 in tree.tokens, "no end of text"
    assert not verifier.lossless


@pytest.mark.parametrize("text", ["", "a", "1.5", "-0.1", "mean=", "mean=0.5", "mean=99", "median=2", "0.5,,0.5"])
def test_other_forms_of_synthetic_acceptance_are_refused(text):
    with pytest.raises(ValueError, match="synthetic acceptance is written as"):
        parse_acceptance(text)


def test_a_bench_marks_synthetic_rows(specdec_command, target, tmp_path):
    """Its text means nothing: it is never compared, and never the conclusion."""
    prompts = tinychat.write_prompts(tmp_path / "p.jsonl", tinychat.QUESTIONS[1:3])
    output = tmp_path / "b.json"
    words = ("--prompts", prompts, "--max-new-tokens", "12", "--synthetic-acceptance", "1,1,1", "--output", str(output))
    ran = specdec_command("bench", "--target", target, *words)
    assert ran.status == 0
    assert "no (synthetic)" in ran.out
    assert "synthetic:1,1,1 generates" not in ran.out
    row = next(r for r in json.loads(output.read_text())["rows"] if r["method"] == "synthetic")
    assert row["mean_acceptance_length"] == pytest.approx(4.0)
    assert row["lossless"] is False
    assert row["match"]["total"] == 0
