"""Figures hold the numbers of the trace, say what is missing, and can be read: in both themes, nothing cut off."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import assert_readable, figure_of, texts_of
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.container import BarContainer
from typer.testing import CliRunner

from specdec.analysis import figures
from specdec.analysis.columns import Trace
from specdec.analysis.figures import FIGURES, costs, draw_all, speculation, trees
from specdec.analysis.figures.picked import pick_step
from specdec.analysis.figures.style import DARK, LIGHT, MissingDataError, shown, themed
from specdec.analysis.load import load
from specdec.analysis.results import Bench, Tune, load_result
from specdec.cli.main import app

DATA = Path(__file__).resolve().parents[2] / "notebooks" / "data"
DRAWN = [
    spec
    for spec in FIGURES
    if spec.draw is not None and spec.name != "specinfer_vs_medusa" and spec.needs != "workload"
]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return load(DATA / "bench.jsonl")


@pytest.fixture(scope="module")
def bench() -> Bench:
    found = load_result(DATA / "bench.json")
    assert isinstance(found, Bench)
    return found


@pytest.fixture(scope="module")
def tune() -> Tune:
    found = load_result(DATA / "tuned.json")
    assert isinstance(found, Tune)
    return found


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "bench.jsonl").read_text("utf-8").splitlines()]


# ----- can be read -----


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("spec", DRAWN, ids=lambda spec: spec.name)
def test_nothing_is_cut_off_or_too_small(spec: Any, theme: Any, trace: Trace, bench: Bench, tune: Tune) -> None:
    with themed(theme):
        figure = figure_of(figures.bound(spec, trace, bench, tune)())
    assert_readable(figure, theme)


@pytest.mark.parametrize("spec", DRAWN, ids=lambda spec: spec.name)
def test_every_figure_names_its_conditions(spec: Any, trace: Trace, bench: Bench, tune: Tune) -> None:
    figure = figure_of(figures.bound(spec, trace, bench, tune)())
    said = " ".join(text.get_text() for text in texts_of(figure))
    for fact in ("smollm2-135m", "float32", "thread", "prompts", "specdec 0.1.0"):
        assert fact in said


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_colours_stand_out_from_the_ground_and_from_each_other(theme: Any) -> None:
    """Deuteranopia and protanopia by Viénot's projection; markers, hatches and words tell the same besides."""
    assert contrast(theme.ink, theme.ground) >= 7
    meanings = (theme.accepted, theme.rejected, theme.own)
    assert all(contrast(color, theme.ground) >= 3 for color in meanings)
    for kind in (
        ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
        ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    ):
        seen = [np.array(kind) @ np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for c in meanings]
        for i, one in enumerate(seen):
            assert all(np.linalg.norm(one - other) > 0.15 for other in seen[i + 1 :])


# ----- the numbers -----


def bars_of(ax: Axes) -> list[BarContainer]:
    return [container for container in ax.containers if isinstance(container, BarContainer)]


def test_the_timelines_are_those_of_the_trace(trace: Trace, lines: list[dict[str, Any]]) -> None:
    ax = speculation.standard_vs_speculative(trace, method="recycling")
    said = " ".join(text.get_text() for text in texts_of(figure_of(ax)))
    question = next(line for line in lines if line["type"] == "prompt" and f"question {line['question_id']} (" in said)
    drafts, passes = bars_of(ax)[:2], bars_of(ax)[1::2]
    assert len(drafts) == 2
    for bars, method in zip(passes, ("plain", "recycling"), strict=True):
        steps = [
            line for line in lines
            if line["type"] == "step" and line["method"] == method and line["turn"] == question["turn"]
            and line["question_id"] == question["question_id"]
        ]  # fmt: skip
        assert [bar.get_width() for bar in bars] == pytest.approx([s["score_s"] + s["verify_s"] for s in steps])
        end = sum(s["draft_s"] + s["score_s"] + s["verify_s"] for s in steps)
        assert f"{sum(len(s['tokens']) for s in steps)} tokens\n{end:.2f} s" in said


def test_survival_is_the_product_of_the_rates(trace: Trace, lines: list[dict[str, Any]]) -> None:
    ax = speculation.acceptance_rate_analysis(trace)
    drawn = next(line for line in ax.get_lines() if line.get_label() == "ngram, measured")
    tried: Counter[int] = Counter()
    met: Counter[int] = Counter()
    for line in lines:
        if line["type"] != "step" or line["method"] != "ngram":
            continue
        for depth, node in enumerate(line["nodes"]):
            is_last = depth + 1 == len(line["nodes"])
            if node in line["tree_parents"] and not (is_last and line["finished"]):
                tried[depth] += 1
                met[depth] += not is_last
    expected = np.cumprod([met[d] / tried[d] for d in range(len(tried)) if tried[d] >= 5])
    assert np.asarray(drawn.get_ydata()) == pytest.approx(expected)


def test_the_flow_shows_one_real_step(trace: Trace, lines: list[dict[str, Any]]) -> None:
    ax = speculation.speculative_algorithm_flow(trace, method="hybrid")
    step = pick_step(trace, "hybrid", max_nodes=12, max_accepted=4, prefer_branches=True)
    said = Counter(text.get_text() for text in texts_of(figure_of(ax)))
    source = next(
        line for line in lines
        if line["type"] == "step" and line["method"] == "hybrid" and line["tree_tokens"] == step.tree_tokens
        and line["position"] == step.position and line["question_id"] == step.label.question_id
    )  # fmt: skip
    texts = {int(k): v for line in lines if line["type"] == "vocabulary" for k, v in line["texts"].items()}
    for token, probability in zip(source["tokens"], source["token_probs"], strict=True):
        assert said[shown(texts[token])]
        assert said[f"p = {probability:.2g}"]
    assert sum(count for text, count in said.items() if "✓ accepted" in text) == source["num_accepted"]
    reached = set(source["nodes"])
    rejected = sum(parent in reached and i not in reached for i, parent in enumerate(source["tree_parents"]))
    left_out = sum(int(text.split()[1]) * count for text, count in said.items() if "more, rejected" in text)
    assert sum(count for text, count in said.items() if "✗ rejected" in text) + left_out == rejected


def test_the_mask_is_that_of_the_steps_tree(trace: Trace) -> None:
    ax = trees.tree_attention_mask(trace, method="hybrid")
    step = pick_step(trace, "hybrid", max_nodes=15, prefer_branches=True)
    (mesh,) = (each for each in ax.collections if isinstance(each, QuadMesh))
    values = mesh.get_array()
    assert values is not None
    seen = np.asarray(values).reshape(len(step.tree_parents), -1) > 0
    for node in range(len(step.tree_parents)):
        above, at = set(), node
        while at >= 0:
            above.add(at)
            at = step.tree_parents[at]
        assert seen[node].tolist() == [True, *(j in above for j in range(len(step.tree_parents)))]


def test_the_tree_counts_what_first_choices_would_have_brought(trace: Trace) -> None:
    ax = trees.tree_structure_visualization(trace, method="hybrid")
    step = pick_step(trace, "hybrid", max_nodes=17, prefer_branches=True)
    chain = 0
    for a, b in pairwise(step.nodes):
        if step.children(a)[0] != b:
            break
        chain += 1
    assert f"{len(step.nodes) - 1} draft" in ax.get_title(loc="left")
    assert f"{chain or 'none'} by its first choices" in ax.get_title(loc="left")


def test_speeds_are_those_of_the_bench_and_of_the_trace(trace: Trace, bench: Bench) -> None:
    for source in (bench, trace):
        ax = trees.speedup_comparison(source)
        points = [line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() in tuple("osD^vPX")]
        assert points == pytest.approx([row["speedup"] for row in bench.rows])


def test_a_lossy_method_is_marked(bench: Bench) -> None:
    rows = [{**row, "lossless": row["method"] != "ngram"} for row in bench.rows]
    ax = trees.speedup_comparison(replace(bench, rows=tuple(rows)))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert [label for label in labels if "lossy" in label] == ["ngram\n(lossy: other text)"]


def test_breakdown_bars_add_up_to_the_measured_seconds(trace: Trace, lines: list[dict[str, Any]]) -> None:
    ax = costs.step_time_breakdown(trace)
    spent: dict[str, float] = defaultdict(float)
    tokens: Counter[str] = Counter()
    for line in lines:
        if line["type"] == "output":
            spent[line["method"]] += line["wall_s"]
            tokens[line["method"]] += line["num_tokens"]
    widths = [
        sum(bar.get_width() for container in bars_of(ax)[i * 4 : i * 4 + 4] for bar in container) for i in range(4)
    ]
    names = ("plain", "ngram", "recycling", "hybrid")
    assert widths == pytest.approx([1000 * spent[name] / tokens[name] for name in names], rel=1e-6)


def test_tuner_points_are_those_of_the_file(tune: Tune) -> None:
    ax = costs.tuner_landscape(tune)
    entry = tune.entries[1]
    star = next(line for line in ax.get_lines() if line.get_marker() == "*")
    assert star.get_xdata()[0] == entry["max_nodes"]
    assert star.get_ydata()[0] == (entry["measured"] or [entry["predicted"]])[0]


def test_two_tree_methods_side_by_side(trace: Trace) -> None:
    """Nothing of ours drafts like both yet, so two methods of a real run lend their numbers under the names."""
    renamed = {"recycling": "model", "hybrid": "medusa"}
    labels = tuple(replace(each, method=renamed.get(each.method, each.method), drafter=None) for each in trace.labels)
    outputs = tuple(
        replace(o, label=replace(o.label, method=renamed.get(o.label.method, o.label.method), drafter=None))
        for o in trace.outputs
    )
    ax = trees.specinfer_vs_medusa(replace(trace, labels=labels, outputs=outputs))
    widths = [bar.get_width() for container in bars_of(ax) for bar in container]
    measured = figures.trees.speedups(trace)
    assert {measured["hybrid"].value, measured["recycling"].value} <= set(widths)


# ----- what is missing -----


def test_figures_without_an_engine_are_named_and_nothing_is_invented(
    tmp_path: Path, trace: Trace, bench: Bench
) -> None:
    wanted = ["block_sharing", "radix_tree_structure", "structured_generation_flow", "tuner_landscape", "cost_curve"]
    drawn = draw_all(tmp_path, trace, bench, only=wanted)
    assert sorted(path.name for path in drawn.paths) == sorted(path.name for path in tmp_path.iterdir())
    assert {path.stem.rsplit("-", 1)[0] for path in drawn.paths} == {"cost_curve"}
    reasons = {each.name: each.reason for each in drawn.missing}
    assert "specdec bench --workload" in reasons["block_sharing"]
    assert "specdec bench --workload" in reasons["radix_tree_structure"]
    assert "grammar" in reasons["structured_generation_flow"]
    assert "specdec tune --output" in reasons["tuner_landscape"]


def test_the_same_data_gives_the_same_bytes(tmp_path: Path, bench: Bench) -> None:
    for folder in ("a", "b"):
        draw_all(tmp_path / folder, bench=bench, only=["speedup_comparison"])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_older_trace_draws_what_it_can(tmp_path: Path, trace: Trace) -> None:
    """Without probabilities, and without texts."""
    bare = replace(
        trace, steps=replace(trace.steps, node_probs=None, token_probs=None, entropies=None, estimates=None),
        runs=tuple(replace(run, texts={}) for run in trace.runs),
    )  # fmt: skip
    with pytest.raises(MissingDataError, match="--trace-probs"):
        speculation.speculative_algorithm_flow(bare)
    ax = trees.tree_structure_visualization(bare)
    assert any(text.get_text().startswith("<") for text in ax.texts)


def test_a_trace_without_drafts_says_so(trace: Trace) -> None:
    only = trace.select(["plain", "hf-generate"])
    for draw in (speculation.standard_vs_speculative, trees.tree_attention_mask, speculation.acceptance_rate_analysis):
        with pytest.raises(MissingDataError, match=r"drafted|proposes trees"):
            draw(only)


@pytest.mark.parametrize(
    ("text", "label"),
    [("a b\n", "a·b↵"), ("", "∅"), ("x" * 40, "x" * 11 + "…"), ("中", "□"), ("$x$", "$x$")],
)
def test_token_labels(text: str, label: str) -> None:
    assert shown(text) == label


# ----- the command -----


def test_the_command_draws_and_lists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["figures", "--trace", str(DATA / "bench.jsonl"), "--out", str(out)]
    result = CliRunner().invoke(app, [*words, "--only", "cost_curve", "--only", "structured_generation_flow"])
    assert result.exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "cost_curve-dark.png", "cost_curve-dark.svg", "cost_curve-light.png", "cost_curve-light.svg",
    ]  # fmt: skip
    assert (
        "not drawn: structured_generation_flow: needs measurements of grammar-constrained generation" in result.stderr
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "nothing to draw from"),
        (["--trace", str(DATA / "bench.json")], "not a trace of specdec"),
        (["--bench", str(DATA / "tuned.json")], "give it as --tuned"),
        (["--trace", str(DATA / "bench.jsonl"), "--trace", str(DATA / "bench-b4.jsonl")], "differ in batch_size"),
        (["--tuned", str(DATA / "bench.json")], "give it as --bench"),
        (["--workload", str(DATA / "bench.json")], "of no workload: give it as --bench"),
        (["--bench", str(DATA / "bench.json"), "--only", "nonesuch"], "there is no figure 'nonesuch'"),
        (["--bench", str(DATA / "bench.json"), "--format", "gif"], "svg or png"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, words: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["figures", *words, "--out", str(tmp_path)])
    assert complaint in str(result.exception)
    assert isinstance(result.exception, ValueError)
