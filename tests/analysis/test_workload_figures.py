"""Figures of a workload hold the numbers of its result, measured here on a tiny model, and can be read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinychat
from drawn import assert_readable, figure_of, texts_of
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.patches import Rectangle
from typer.testing import CliRunner

from specdec.analysis import figures
from specdec.analysis.figures import FIGURES, blocks, draw_all, prefixes, serving
from specdec.analysis.figures.style import DARK, LIGHT, MissingDataError, themed
from specdec.analysis.report import build
from specdec.analysis.results import Workload, load_result
from specdec.cli.bench_config import BenchConfig
from specdec.cli.main import app
from specdec.cli.workload import run_workload
from specdec.cli.workload_options import WorkloadOptions
from specdec.cli.workload_summary import summarise_workload

DRAWN = [spec for spec in FIGURES if spec.needs == "workload"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Path]:
    """Results of two small workloads."""
    folder = tmp_path_factory.mktemp("workloads")
    target = tinychat.save(folder / "target", tinychat.make_model(max_position_embeddings=4096, eos=None))

    def run(workload: str, engines: list[str], max_rows: list[int]) -> Path:
        serving = WorkloadOptions(workload=workload, engines=engines, max_rows=max_rows, kv_memory="8MB")
        config = BenchConfig(target=target, max_new_tokens=10, drafters=["ngram"], adaptive=False, serving=serving)
        path = folder / f"{workload.partition(':')[0]}.json"
        path.write_text(json.dumps(summarise_workload(run_workload(config, tell=lambda *_: None))))
        return path

    return {
        "samples": run("samples:n=4", ["paged:prefix_sharing=false"], [3]),
        "ragged": run("ragged:n=5", ["paged", "hf"], [3]),
        "prefix": run("prefix:n=5,tokens=150", ["paged", "paged:prefix_sharing=false"], [1, 4]),
    }


@pytest.fixture(scope="module")
def ragged(files: dict[str, Path]) -> Workload:
    found = load_result(files["ragged"])
    assert isinstance(found, Workload)
    return found


@pytest.fixture(scope="module")
def prefix(files: dict[str, Path]) -> Workload:
    found = load_result(files["prefix"])
    assert isinstance(found, Workload)
    return found


def snapshot_of(workload: Workload) -> dict[str, Any]:
    return serving.paged_row(workload)["kv"]["snapshot"]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("spec", DRAWN, ids=lambda spec: spec.name)
def test_nothing_is_cut_off_and_conditions_are_named(spec: Any, theme: Any, ragged: Workload, prefix: Workload) -> None:
    with themed(theme):
        figure = figure_of(figures.bound(spec, None, None, None, [ragged, prefix])())
    assert_readable(figure, theme)
    said = " ".join(text.get_text() for text in texts_of(figure))
    for fact in ("workload ", "float32", "thread", "prompts", "specdec 0.1.0"):
        assert fact in said


def bars_of(ax: Any) -> list[list[float]]:
    return [[bar.get_width() for bar in each] for each in ax.containers if isinstance(each, BarContainer)]


def test_the_problem_is_that_of_one_pass(ragged: Workload) -> None:
    ax = serving.kv_cache_problem(ragged)
    kept = sorted((each["num_kept"] for each in snapshot_of(ragged)["rows"]), reverse=True)
    free, padding, tokens = bars_of(ax)
    longest = serving.paged_row(ragged)["kv"]["longest"]
    assert tokens == kept
    assert padding == [max(kept) - each for each in kept]
    assert free == [longest - max(kept)] * len(kept)
    assert f"{sum(kept) / longest / len(kept):.0%}" in ax.get_title(loc="left")


def test_memory_lines_are_the_shares_of_each_pass(ragged: Workload) -> None:
    ax = serving.memory_comparison(ragged)
    kv = serving.paged_row(ragged)["kv"]
    lines = [np.asarray(line.get_ydata()) for line in ax.get_lines()]
    for line, used, had, mean in zip(
        lines, ("filled", "tokens", "tokens"), ("slots", "padded", "reserved"),
        ("utilisation", "utilisation_padded", "utilisation_reserved"), strict=True,
    ):  # fmt: skip
        shares = 100 * np.array(kv["passes"][used]) / np.array(kv["passes"][had])
        assert line == pytest.approx(shares)
        assert shares.mean() == pytest.approx(100 * kv[mean])


def test_speeds_are_those_of_the_result(ragged: Workload, prefix: Workload) -> None:
    bars = [width for widths in bars_of(serving.performance_comparison(ragged)) for width in widths]
    assert bars == [row["tokens_per_s"] for row in ragged.rows]
    drawn = {
        str(line.get_label()).partition("\n")[0]: list(np.asarray(line.get_ydata()))
        for line in serving.throughput_comparison(prefix).get_lines()
    }
    for name, speeds in drawn.items():
        assert speeds == [row["tokens_per_s"] for row in prefix.rows if serving.engine_label(row) == name]
    assert len(drawn) == 2


def test_shared_blocks_are_those_that_several_rows_hold(prefix: Workload) -> None:
    ax = blocks.block_sharing(prefix)
    rows = serving.paged_row(prefix, sharing=True)["kv"]["snapshot"]["rows"]
    counts = Counter(block for each in rows for block in each["blocks"])
    colours = Counter(to_hex(patch.get_facecolor()) for patch in ax.patches if isinstance(patch, Rectangle))
    assert colours[LIGHT.own] == sum(count for count in counts.values() if count > 1) > 0
    assert sum(colours.values()) == sum(counts.values())
    assert f"{len(counts)} blocks" in ax.get_title(loc="left")


def test_the_tree_says_how_many_rows_use_what(prefix: Workload) -> None:
    ax = prefixes.radix_tree_structure(prefix)
    said = [text.get_text() for text in ax.texts]
    nodes = snapshot_of(prefix)["prefixes"]
    assert max(node["num_holders"] for node in nodes) == 5  # four rows and the tree
    for node in nodes:
        users = node["num_holders"] - 1
        assert any(text.startswith(f"{node['num_tokens']} tokens, {users or 'no'} row") for text in said)


def test_attention_shows_the_blocks_of_one_row(prefix: Workload) -> None:
    ax = blocks.attention_flow(prefix)
    rows = {each["request_id"]: each for each in snapshot_of(prefix)["rows"]}
    row = rows[ax.get_title(loc="left").split()[1]]
    named = [int(text.get_text().split("\n")[1]) for text in ax.texts if text.get_text().startswith("block\n")]
    assert len(named) == 10
    assert set(named) <= set(row["blocks"])


# ----- what is missing -----


def test_what_a_workload_does_not_hold_is_said(tmp_path: Path, files: dict[str, Path]) -> None:
    result = load_result(files["samples"])
    assert isinstance(result, Workload)
    drawn = draw_all(tmp_path, workloads=[result], only=[spec.name for spec in DRAWN], formats=("svg",))
    reasons = {each.name: each.reason for each in drawn.missing}
    assert set(reasons) == {
        "block_sharing", "performance_comparison", "attention_flow", "radix_tree_structure", "throughput_comparison",
    }  # fmt: skip
    assert "at least two engines" in reasons["performance_comparison"]
    assert "--max-rows" in reasons["throughput_comparison"]
    assert "shared prefix" in reasons["block_sharing"]


def test_without_the_engine_nothing_of_its_cache_is_drawn(ragged: Workload) -> None:
    others = replace(ragged, rows=tuple(row for row in ragged.rows if row["kind"] == "hf"))
    for draw in (serving.kv_cache_problem, serving.memory_comparison, blocks.block_structure, blocks.attention_flow):
        with pytest.raises(MissingDataError, match="engine paged"):
            draw(others)


def test_the_command_draws_from_several_files(tmp_path: Path, files: dict[str, Path]) -> None:
    words = ["figures", "--workload", str(files["ragged"]), "--workload", str(files["prefix"]), "--out", str(tmp_path)]
    result = CliRunner().invoke(
        app, [*words, "--format", "svg", "--only", "block_sharing", "--only", "kv_cache_problem"]
    )
    assert result.exit_code == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_a_report_refuses_a_workload_in_words(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="specdec figures --workload"):
        build([files["ragged"]])


def test_a_damaged_result_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    content = json.loads(files["ragged"].read_text())
    del content["rows"][0]["kv"]["snapshot"]
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        load_result(path)
