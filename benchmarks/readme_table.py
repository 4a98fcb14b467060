"""Writes the README's table from a committed result of ``specdec bench --output``, so that no number is typed by hand.

    python benchmarks/readme_table.py              # benchmarks/cpu-float32.json -> README.md
    python benchmarks/readme_table.py RESULT.json  # print the table of any result

Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "cpu-float32.json"
README = ROOT / "README.md"
START, END = "<!-- table:start -->", "<!-- table:end -->"
HEAD = ("method", "tokens/s", "speedup (95 % interval)", "slowest to fastest category", "tokens a pass", "same text")


def render(result: Mapping[str, Any]) -> str:
    """The table and its conditions in Markdown.

    Raises:
        ValueError: a schema that this script does not know, or an interrupted run.
    """
    if result.get("schema") != 1:
        raise ValueError(f"the table is made from results of schema 1, got {result.get('schema')!r}")
    provenance = result["provenance"]
    if result.get("partial") or provenance.get("partial"):
        raise ValueError("the result is of an interrupted run: run the bench to its end")
    lines = [_line(HEAD), _line(["---", *["---:"] * (len(HEAD) - 1)])]
    lines += [_line(_cells(row)) for row in result["rows"]]
    num_prompts = max((row.get("num_prompts") or 0 for row in result["rows"]), default=0)
    return "\n".join([*lines, "", *_conditions(provenance, num_prompts)])


def splice(text: str, table: str) -> str:
    """``text`` with ``table`` between the two markers.

    Raises:
        ValueError: the markers are not there exactly once, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the text must hold {START} and, behind it, {END}, each exactly once")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n{table}\n{END}{after}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    length = row.get("mean_acceptance_length")
    return [
        _name(row),
        f"{row['tokens_per_s']:.1f}",
        _speedup(row),
        _spread(row.get("categories") or {}),
        "-" if length is None else f"{length:.2f}",
        _match(row.get("match")),
    ]


def _name(row: Mapping[str, Any]) -> str:
    if row["method"] in ("hf-generate", "hf-prompt-lookup", "hf-assisted", "plain"):
        return str(row["method"])
    lossy = "" if row.get("lossless", True) else ", LOSSY"
    return f"{row.get('drafter') or row['method']} ({row['verifier']}{lossy})"


def _speedup(row: Mapping[str, Any]) -> str:
    if row["method"] == "hf-generate":
        return "1 (the reference)"
    low, high = row.get("speedup_low"), row.get("speedup_high")
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{row['speedup']:.2f}{interval}"


def _spread(categories: Mapping[str, Mapping[str, Any]]) -> str:
    known = sorted((c["speedup"], name) for name, c in categories.items() if c.get("speedup") is not None)
    if len(known) < 2 or known[0][0] == known[-1][0]:
        return "-"
    (low, slowest), (high, fastest) = known[0], known[-1]
    return f"{low:.2f} {slowest}, {high:.2f} {fastest}"


def _match(match: Mapping[str, Any] | None) -> str:
    if not match or not match.get("total"):
        return "-"
    text = f"{match['identical']}/{match['total']}"
    notes = [f"{match[kind]} {kind}" for kind in ("explained", "unexplained") if match.get(kind)]
    if match.get("compared_with") not in (None, "hf-generate"):
        notes.append(f"as {match['compared_with']}")
    return f"{text}, {', '.join(notes)}" if notes else text


def _conditions(provenance: Mapping[str, Any], num_prompts: int) -> list[str]:
    machine, versions = provenance["machine"], provenance["versions"]
    where = f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores"
    if machine.get("gpus") and str(provenance["device"]).startswith("cuda"):
        where = f"{', '.join(machine['gpus'])} ({where})"
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = str(provenance.get("commit") or "unknown")[:12] + (" (changed since)" if provenance.get("dirty") else "")
    models = [f"{role} {facts['id']}" for role, facts in (provenance.get("models") or {}).items() if facts.get("id")]
    what = [*models, str(provenance["dtype"]), *([f"{num_prompts} prompts"] if num_prompts else [])]
    return [
        f"Conditions: {where}, {provenance['threads']} threads; {'; '.join(what)}; "
        f"{known}; commit {commit}; {str(provenance['date'])[:10]}.",
        f"Command: `{provenance['command']}`",
    ]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    """Print the table of the named result, or write that of the committed one into the README."""
    if arguments:
        print(render(json.loads(Path(arguments[0]).read_text("utf-8"))))
        return
    table = render(json.loads(RESULT.read_text("utf-8")))
    README.write_text(splice(README.read_text("utf-8"), table), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
