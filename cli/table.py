"""What a bench prints: a table, notes on what was not or could not be compared, and what it means in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from specdec.cli.measure import HF_ASSISTED, HF_GENERATE, HF_LOOKUP, PLAIN
from specdec.cli.synthetic import SYNTHETIC

_REFERENCES = (HF_GENERATE, HF_LOOKUP, HF_ASSISTED, PLAIN)
_PIPE_WIDTH = 120  # where there is no terminal to ask
_TIES_SHOWN = 4  # in 16 bits there may be one in every output

Row = Mapping[str, Any]


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Table, notes and conclusion on standard output."""
    console = wide_console(console)
    if summary["rows"]:
        console.print(make_table(summary["rows"]))
    for line in (*notes(summary), conclusion(summary)):
        console.print(line, markup=False, soft_wrap=True)


def wide_console(console: Console | None) -> Console:
    """``console``, or standard output, which is as wide as a table where nobody says how wide it is."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def new_table(first: str, *titles: str) -> Table:
    """A table whose first column is folded where it is long; the others hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    table.add_column(first, overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def make_table(rows: list[Row]) -> Table:
    """Narrow enough for 80 columns: methods with many options are folded."""
    table = new_table(
        "method", "speedup [95 %]", "tokens\n/s", "mean acc.\nlength", "draft/score\n/verify %", "loss-\nless", "match"
    )
    for row in rows:
        table.add_row(
            label(row),
            speedup(row),
            f"{row['tokens_per_s']:.1f}",
            f"{row['mean_acceptance_length']:.2f}",
            _shares(row),
            _lossless(row),
            _match(row),
        )
    return table


def label(row: Row) -> str:
    """The method, or the drafter with its options."""
    return str(row["drafter"] or row["method"])


def speedup(row: Row) -> str:
    if row["method"] == HF_GENERATE:
        return "1 (baseline)"
    if row["num_measurements"] < 2:
        return f"{row['speedup']:.2f}x [one run]"
    return f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def _lossless(row: Row) -> str:
    if row["method"] == SYNTHETIC:
        return "no (synthetic)"
    return "yes" if row["lossless"] else "NO"


def _shares(row: Row) -> str:
    parts = [row[name] for name in ("draft_s", "score_s", "verify_s")]
    if None in parts:
        return "-"
    return "/".join(f"{100 * part / row['wall_s']:.0f}" for part in parts)


def _match(row: Row) -> str:
    match = row["match"]
    if row["method"] == SYNTHETIC:
        return "(no text)"
    if match["compared_with"] is None:
        return "reference" if row["method"] in (HF_GENERATE, PLAIN) else "(sampled)"
    return match_cell(match)


def match_cell(match: Mapping[str, Any]) -> str:
    """How many outputs are identical, and what the others are."""
    text = f"{match['identical']}/{match['total']}"
    if match["explained"]:
        text += f" +{match['explained']} tied"
    if match["unexplained"]:
        text += f" {match['unexplained']} WRONG"
    return text


def notes(summary: Mapping[str, Any]) -> Iterator[str]:
    """What the table does not say by itself."""
    rows = summary["rows"]
    if summary["partial"]:
        count = rows[0]["num_prompts"] if rows else 0
        yield f"Interrupted: only the {count} prompts that every method had finished are counted."
    for skipped in summary["skipped"]:
        yield f"{skipped['method']} was not measured: {skipped['reason']}."
    if not rows:
        return
    settings = summary["provenance"]["settings"]
    yield _comparison(settings, is_lossless=all(row["lossless"] for row in rows if row["method"] != SYNTHETIC))
    differences = [(row, difference) for row in rows for difference in row["match"]["differences"]]
    ties = [entry for entry in differences if entry[1]["is_explained"]]
    for row, difference in [entry for entry in differences if not entry[1]["is_explained"]] + ties[:_TIES_SHOWN]:
        yield _difference(row, difference)
    if len(ties) > _TIES_SHOWN:
        yield f"{len(ties) - _TIES_SHOWN} more outputs differ at near ties; --output writes all of them."


def _comparison(settings: Mapping[str, Any], *, is_lossless: bool) -> str:
    if settings["temperature"] == 0:
        return "match: outputs identical to those of transformers' generate(), greedy."
    if settings["verifier"] == "match":
        return (
            "match: sampled outputs identical to our own plain decoding with the same seed; transformers samples with "
            "other noise, so only the distribution is the same."
        )
    kept = "keeps" if is_lossless else "does NOT keep"
    return f"match: sampled outputs cannot be compared one by one; the verification rule {kept} the distribution."


def _difference(row: Row, difference: Mapping[str, Any]) -> str:
    margin = "no token to compare" if difference["margin"] is None else f"margin {difference['margin']:.2g}"
    verdict = "a near tie" if difference["is_explained"] else "UNEXPLAINED"
    return (
        f"{label(row)}, question {difference['question_id']}, turn {difference['turn'] + 1}: first difference at new token "
        f"{difference['position']} ({difference['expected']} expected, got {difference['got']}), {margin}: {verdict}."
    )


def conclusion(summary: Mapping[str, Any]) -> str:
    """One sentence on the fastest drafter."""
    if not summary["rows"]:
        return "Nothing was measured."
    drafted = [row for row in summary["rows"] if row["method"] not in (*_REFERENCES, SYNTHETIC)]
    row = max(drafted or [r for r in summary["rows"] if r["method"] == PLAIN], key=lambda r: float(r["speedup"]))
    return f"{_speed(row)}, {_identity(row)}.{_share_of_speculation(row)}"


def _share_of_speculation(row: Row) -> str:
    """What is left of the speedup against our own plain decoding, which runs on the same layers."""
    if row.get("speedup_vs_plain") is None or row["method"] == PLAIN:
        return ""
    interval = f"{row['speedup_vs_plain']:.2f}x [{row['speedup_vs_plain_low']:.2f}, {row['speedup_vs_plain_high']:.2f}]"
    return f" Speculation alone brings {interval}: that is against plain decoding in the same loop."


def _speed(row: Row) -> str:
    name, interval = label(row), f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
    against = "as fast as Hugging Face generate() on this machine"
    if row["num_measurements"] < 2:
        return f"{name} generates {row['speedup']:.2f}x {against} in a single measurement, which says little"
    if row["speedup_low"] > 1:
        return f"{name} generates {interval} {against}"
    if row["speedup_high"] < 1:
        return f"{name} is slower here: it generates {interval} {against}"
    return f"{name} shows no clear gain: it generates {interval} {against}"


def _identity(row: Row) -> str:
    match = row["match"]
    count = f"{match['identical']} of {match['total']}"
    if not row["lossless"]:
        return "but its verifier is lossy: the text is not what the model alone would write"
    if match["compared_with"] is None:
        return "with the same distribution (sampled outputs were not compared)"
    same = "tokens identical to" + (
        " it" if match["compared_with"] == HF_GENERATE else " plain decoding with the same seed"
    )
    if match["unexplained"]:
        return (
            f"but {match['unexplained']} of {match['total']} outputs differ for no known reason: do not trust the speed"
        )
    if match["explained"]:
        return f"with {same} ({count}; the others differ at near ties, which rounding decides)"
    return f"with identical tokens ({count})" if match["compared_with"] == HF_GENERATE else f"with {same} ({count})"
