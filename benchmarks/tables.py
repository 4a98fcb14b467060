"""Writes the result tables of README.md and docs/performance.md, so that no number is typed by hand.

    python benchmarks/tables.py              # fill every table of the documents
    python benchmarks/tables.py RESULT.json  # print the table of any result of `specdec bench --output`

A table stands between two comments; the first names the result and, if not all, the rows:

    <!-- table:start cpu-float32.json hf-generate, plain, hybrid -->
    <!-- table:end -->

Needs nothing but Python.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
TABLE = re.compile(r"<!-- table:start (?P<file>\S+\.json)(?P<rows>[^\n]*?) -->\n.*?<!-- table:end -->", re.DOTALL)
WORKLOAD_HEAD = (
    "engine", "rows", "tokens/s", "first token, s (p50, p99)", "between tokens, ms (p50, p90, p99)", "tokens per pass",
    "prompt tokens known", "cache in use", "same text",
)  # fmt: skip
HEAD = ("method", "tokens/s", "over generate()", "over plain", "tokens per pass", "same text")


def render(result: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """The table of ``result`` and its conditions in Markdown; only the rows called ``names``, if any are given.

    Raises:
        ValueError: a schema that this script does not know, an interrupted run, or a row that is not there.
    """
    if result.get("schema") != 1:
        raise ValueError(f"tables are made from results of schema 1, got {result.get('schema')!r}")
    provenance = result["provenance"]
    if result.get("partial") or provenance.get("partial"):
        raise ValueError("the result is of an interrupted run: run the bench to its end")
    if result.get("kind") == "workload":
        return _render_workload(result, names)
    rows = {row.get("drafter") or row["method"]: row for row in result["rows"]}
    rows = {row["method"] if row["method"] == "plain" else name: row for name, row in rows.items()}
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"the result has no row {', '.join(missing)}; it has {', '.join(rows)}")
    lines = [_line(HEAD), _line(["---", *["---:"] * (len(HEAD) - 1)])]
    lines += [_line(_cells(rows[name])) for name in names or rows]
    num_prompts = max((row.get("num_prompts") or 0 for row in result["rows"]), default=0)
    return "\n".join([*lines, "", *_conditions(provenance, num_prompts)])


def _render_workload(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """The same for a result of ``specdec bench --workload``; a row's name is its engine, for all drafters and rows."""
    known = {row["engine"] for row in result["rows"]}
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"the result has no engine {', '.join(missing)}; it has {', '.join(sorted(known))}")
    shown = [row for row in result["rows"] if not names or row["engine"] in names]
    lines = [_line(WORKLOAD_HEAD), _line(["---", *["---:"] * (len(WORKLOAD_HEAD) - 1)])]
    lines += [_line(_workload_cells(row)) for row in shown]
    return "\n".join([*lines, "", *_conditions(result["provenance"], int(result["workload"]["num_requests"]))])


def _workload_cells(row: Mapping[str, Any]) -> list[str]:
    first, gaps, kv = row["first_token_s"], row["inter_token_s"], row["kv"]
    drafter = row["drafter"] if row["drafter"] not in (None, "none") else ""
    hits, accepted = row["prefix_hit_rate"], row["acceptance"]
    return [
        f"{row['engine']} + {drafter}" if drafter else row["engine"],
        str(row["max_rows"]),
        f"{row['tokens_per_s']:.1f}",
        f"{first['p50']:.2f}, {first['p99']:.2f}",
        "-" if gaps is None else ", ".join(f"{1000 * gaps[name]:.0f}" for name in ("p50", "p90", "p99")),
        "-" if accepted is None else f"{accepted['mean_acceptance_length']:.2f}",
        "-" if hits is None else f"{hits:.0%}",
        "-" if kv is None else f"{kv['utilisation']:.1%}",
        _match({**row["match"], "compared_with": None}),
    ]


def fill(text: str) -> str:
    """``text`` with every table rendered from the file that it names.

    Raises:
        ValueError: a start without an end, or a result that cannot be rendered.
        OSError: a result that cannot be read.
    """
    if text.count("<!-- table:start") != len(TABLE.findall(text)):
        raise ValueError("each table stands between <!-- table:start FILE.json [ROW, ...] --> and <!-- table:end -->")

    def table(match: re.Match[str]) -> str:
        names = [name.strip() for name in match["rows"].split(", ") if name.strip()]
        rendered = render(json.loads((RESULTS / match["file"]).read_text("utf-8")), names)
        return f"{match[0].splitlines()[0]}\n{rendered}\n<!-- table:end -->"

    return TABLE.sub(table, text)


def _cells(row: Mapping[str, Any]) -> list[str]:
    length = row.get("mean_acceptance_length")
    return [
        _name(row),
        f"{row['tokens_per_s']:.1f}",
        "1" if row["method"] == "hf-generate" else _ratio(row, "speedup"),
        "1" if row["method"] == "plain" else _ratio(row, "speedup_vs_plain") if row.get("drafter") else "-",
        "-" if length is None else f"{length:.2f}",
        _match(row.get("match")),
    ]


def _name(row: Mapping[str, Any]) -> str:
    if row["method"] in ("hf-generate", "hf-prompt-lookup", "hf-assisted", "plain"):
        return str(row["method"])
    lossy = "" if row.get("lossless", True) else ", LOSSY"
    return f"{row.get('drafter') or row['method']} ({row['verifier']}{lossy})"


def _ratio(row: Mapping[str, Any], key: str) -> str:
    """The ratio and its 95 % interval."""
    if row.get(key) is None:
        return "-"
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{row[key]:.2f}x{interval}"


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
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name))
    commit = str(provenance.get("commit") or "unknown")[:12] + (" (changed since)" if provenance.get("dirty") else "")
    models = [f"{role} {facts['id']}" for role, facts in (provenance.get("models") or {}).items() if facts.get("id")]
    what = [*models, str(provenance["dtype"]), *([f"{num_prompts} prompts"] if num_prompts else [])]
    return [
        f"{where}, {provenance['threads']} threads; {'; '.join(what)}; {known}; "
        f"commit {commit}, {str(provenance['date'])[:10]}. Reproduce: `{provenance['command']}`",
    ]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    """Print the table of the named result, or fill those of the documents."""
    if arguments:
        print(render(json.loads(Path(arguments[0]).read_text("utf-8"))))
        return
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
