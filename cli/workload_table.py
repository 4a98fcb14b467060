"""What a workload prints: a table of the engines, their use of the cache, and what was compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.cli.table import match_cell, new_table, wide_console

Row = Mapping[str, Any]


def print_workload(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Table and notes on standard output."""
    console = wide_console(console)
    if summary["rows"]:
        console.print(make_table(summary["rows"]))
    for line in notes(summary):
        console.print(line, markup=False, soft_wrap=True)


def make_table(rows: list[Row]) -> Table:
    """One line for each engine."""
    table = new_table(
        "engine", "rows", "tokens\n/s", "first token\np50 / p99 s", "between tokens\np50 / p90 / p99 ms",
        "mean acc.\nlength", "prefix\nhits", "pre-\nempted", "match",
    )  # fmt: skip
    for row in rows:
        first, gaps, accepted = row["first_token_s"], row["inter_token_s"], row["acceptance"]
        table.add_row(
            label(row),
            str(row["max_rows"]),
            f"{row['tokens_per_s']:.1f}",
            f"{first['p50']:.2f} / {first['p99']:.2f}",
            "-" if gaps is None else " / ".join(f"{1000 * gaps[name]:.0f}" for name in ("p50", "p90", "p99")),
            "-" if accepted is None else f"{accepted['mean_acceptance_length']:.2f}",
            "-" if row["prefix_hit_rate"] is None else f"{row['prefix_hit_rate']:.0%}",
            "-" if row["preemptions"] is None else str(row["preemptions"]),
            "(sampled)" if row["match"]["compared_with"] is None else match_cell(row["match"]),
        )
    return table


def label(row: Row) -> str:
    """The engine, and what drafts for it."""
    return str(row["engine"]) + (f" + {row['drafter']}" if row["drafter"] not in (None, "none") else "")


def notes(summary: Mapping[str, Any]) -> Iterator[str]:
    """What the table does not say by itself."""
    work, rows = summary["workload"], summary["rows"]
    if summary["partial"]:
        yield "Interrupted: only the repeats that every engine had finished are counted."
    if not rows:
        yield "Nothing was measured."
        return
    yield (
        f"{work['num_requests']} requests, prompts of {min(work['prompt_tokens'])} to {max(work['prompt_tokens'])} tokens, "
        f"up to {max(work['max_new_tokens'])} new ones. match: the same tokens as each request alone."
    )
    for row in rows:
        if row["kv"] is not None:
            yield f"{label(row)}, {row['max_rows']} rows: {_use(row['kv'])}"
        for difference in [each for each in row["match"]["differences"] if not each["is_explained"]]:
            yield (
                f"{label(row)}, request {difference['question_id']}: first difference at new token "
                f"{difference['position']} ({difference['expected']} expected, got {difference['got']}): UNEXPLAINED."
            )


def _use(kv: Mapping[str, Any]) -> str:
    shared = f" Each slot served {kv['tokens_per_slot']:.2f} tokens of rows." if kv["tokens_per_slot"] > 1 else ""
    return (
        f"{kv['utilisation']:.1%} of the cache's slots held a token, the mean over passes "
        f"({kv['utilisation_in_pass']:.1%} with the room for trees); padded to the longest row it would be "
        f"{kv['utilisation_padded']:.1%}, with the longest request's room for each {kv['utilisation_reserved']:.1%}.{shared}"
    )
