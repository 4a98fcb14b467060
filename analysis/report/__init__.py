"""``specdec report``: one self-contained HTML file of traces and results, a chapter for each set of conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from specdec.analysis.columns import Trace
from specdec.analysis.conditions import comparable
from specdec.analysis.figures.style import conditions
from specdec.analysis.load import load
from specdec.analysis.report import page
from specdec.analysis.report.facts import Facts, facts_of_bench, facts_of_trace
from specdec.analysis.results import Bench, Tune, Workload, is_result, load_result
from specdec.records.trace import read_trace


@dataclass(slots=True)
class Chapter:
    """What was measured under one set of conditions; speeds of different ones are never mixed."""

    paths: list[str] = field(default_factory=list)
    trace: Trace | None = None
    bench: Bench | None = None
    tune: Tune | None = None


def build(paths: Sequence[str | Path]) -> str:
    """The page for traces (.jsonl) and results of ``bench`` and ``tune`` (.json).

    Raises:
        ValueError: no file, or one that is neither.
        OSError: a file cannot be read.
    """
    if not paths:
        raise ValueError("name at least one trace or result of specdec bench")
    all_chapters = chapters(map(str, paths))
    parts = ["<h1>specdec report</h1>"]
    for number, chapter in enumerate(all_chapters):
        facts = _facts(chapter)
        title = "What the tuner found" if facts is None else _title(facts)
        # What the first chapter says stands above everything else.
        parts.append(f'<h2 id="chapter-{number}">{escape(title)}</h2>' if number or facts is None else "")
        parts.append(page.head(facts) if facts else "")
        parts.append(_contents(all_chapters) if number == 0 else "")
        parts.append(_render(chapter, facts, number))
    return page.document("specdec report", "\n".join(part for part in parts if part))


def chapters(paths: Iterable[str]) -> list[Chapter]:
    """Files of equal conditions together: a trace finds its own bench result, shards of a run find each other."""
    by_name: dict[str, Chapter] = {}
    for path in paths:
        result = load_result(path) if is_result(path) else None
        if isinstance(result, Workload):
            raise ValueError(f"{path} is of a workload, which has no report: draw it with specdec figures --workload")
        key = repr(comparable(result.provenance if result else next(read_trace(path))))
        if isinstance(result, Tune):
            by_name[f"tune {path}"] = Chapter([path], tune=result)
            continue
        chapter = by_name.setdefault(key, Chapter())
        if result is None:
            chapter.paths.append(path)
        else:
            chapter.bench = result
    for chapter in by_name.values():
        if chapter.tune is None and chapter.paths:
            chapter.trace = load(*chapter.paths)
    return list(by_name.values())


def _facts(chapter: Chapter) -> Facts | None:
    if chapter.trace is not None:
        return facts_of_trace(chapter.trace)
    return None if chapter.bench is None else facts_of_bench(chapter.bench)


def _render(chapter: Chapter, facts: Facts | None, number: int) -> str:
    figures, missing = page.figures(chapter.trace, chapter.bench, chapter.tune)
    if facts is None:
        assert chapter.tune is not None
        where = escape(conditions(chapter.tune.provenance))
        return f'<p class="conditions">{where}</p>\n{page.tune_table(chapter.tune)}\n{figures}'
    parts = [
        page.method_table(facts),
        page.category_table(facts),
        f'<h3 id="figures-{number}">Figures</h3>\n{figures}' if figures else "",
        "" if chapter.trace is None else page.drill_down(chapter.trace, number),
        page.provenance(facts, number),
        page.missing_list(missing),
    ]
    return "\n".join(part for part in parts if part)


def _title(facts: Facts) -> str:
    return conditions({**facts.provenance, "versions": {}, "date": None}) or "a run"


def _contents(all_chapters: Sequence[Chapter]) -> str:
    """Links to the chapters, where there are several."""
    if len(all_chapters) < 2:
        return ""
    links = []
    for number, chapter in enumerate(all_chapters):
        facts = _facts(chapter)
        where = f"chapter-{number}" if number else "main"
        links.append(f'<li><a href="#{where}">{escape(_title(facts) if facts else "what the tuner found")}</a></li>')
    return f'<nav aria-label="Chapters"><ul>{"".join(links)}</ul></nav>'
