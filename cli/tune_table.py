"""What ``specdec tune`` prints: the race of a batch size, and the best static trees of a tuned file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from specdec.drafters.trees.shapes import sequoia
from specdec.records.tuned import load_tuned
from specdec.tune.prediction import Candidate

_TREE_SIZES = (4, 8, 16, 32)  # with the root, as in the literature


def print_race(size: int, racers: Sequence[Candidate], best: Candidate, curve: dict[int, float]) -> None:
    """The candidates that were raced at batch size ``size``, below ``curve``: columns -> seconds of a pass."""
    relative = ", ".join(f"{columns}: {pass_s / curve[1]:.2f}" for columns, pass_s in curve.items())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("configuration", overflow="fold")
    for title in (
        "whole answer:\npredicted",
        "\nmeasured [95 %]",
        "decoding only:\npredicted",
        "\nmeasured [95 %]",
        "",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for racer in racers:
        mark = "best" if racer is best else "dropped early" if racer.is_dropped else ""
        whole, decode = (
            "-" if speedup is None else "{:.2f}x [{:.2f}, {:.2f}]".format(*speedup)
            for speedup in (racer.measured, racer.measured_decode)
        )
        table.add_row(str(racer), f"{racer.predicted:.2f}x", whole, f"{racer.predicted_decode:.2f}x", decode, mark)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    print(f"batch size {size}: a pass of one column takes {1000 * curve[1]:.1f} ms; relative to it {relative}")
    console.print(table)


def print_trees(path: Path) -> None:
    """For each batch size the best trees that its acceptance table allows."""
    for entry in load_tuned(path).entries:
        print(f"batch size {entry.batch_size}, drafter {entry.drafter}")
        if not entry.acceptance_table:
            print("no acceptance table: too few drafts were verified")
            continue
        for size in _TREE_SIZES:
            shape = sequoia(entry.acceptance_table, size - 1)
            expected = shape.expected_tokens(entry.acceptance_table)
            print(f"\n{size} nodes with the root: {expected:.2f} tokens a step\n{shape.render(entry.acceptance_table)}")
