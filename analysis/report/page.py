"""The parts of a report as HTML. Every text of a run is escaped; figures are inlined, so the page needs no network."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from specdec.analysis.columns import Trace
from specdec.analysis.figures import FIGURES, Missing, bound, save
from specdec.analysis.figures.style import MissingDataError, conditions
from specdec.analysis.intervals import Estimate
from specdec.analysis.report import drill
from specdec.analysis.report.facts import MIN_PROMPTS, Facts, is_proved, summary
from specdec.analysis.results import Bench, Tune

NONE = "<td><small>-</small></td>"


def document(title: str, body: str) -> str:
    """The whole page."""
    files = resources.files("specdec.analysis.report")
    style, code = ((files / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to the results</a>\n<main id="main">\n{body}\n</main>\n'
        f"<script>\n{code}</script>\n</body>\n</html>\n"
    )


def head(facts: Facts) -> str:
    """The sentence that stands first, and what it holds for."""
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in facts.warnings)
    return (
        f'<p class="summary">{escape(summary(facts))}</p>\n'
        f'<p class="conditions">{escape(conditions(facts.provenance))}. In brackets: 95 % intervals over prompts.</p>\n'
        f"{warnings}"
    )


def method_table(facts: Facts) -> str:
    """One row for each method."""
    rows = []
    for method in facts.methods:
        lossless = {True: "yes", False: '<span class="lossy">no</span>', None: "<small>?</small>"}[method.is_lossless]
        same = "-" if method.same_text is None else f"{method.same_text[0]} of {method.same_text[1]}"
        cells = [
            f'<th scope="row">{escape(method.name)}</th>',
            _cell(method.vs_plain),
            _cell(method.vs_generate),
            f"<td>{method.tokens_per_s:.1f}</td>" if method.tokens_per_s else NONE,
            f"<td>{method.length:.2f}</td>" if method.length else NONE,
            f"<td>{same}</td>",
            f"<td>{lossless}</td>",
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = (
        "method",
        "against plain decoding",
        "against generate()",
        "tokens/s",
        "tokens a pass",
        "same text",
        "lossless",
    )
    return _table(heads, rows, "Methods and their speed")


def category_table(facts: Facts) -> str:
    """One row for each category, one column for each method that drafts."""
    drafting = [method for method in facts.methods if method.drafts]
    categories = list(dict.fromkeys(name for method in drafting for name in method.categories))
    if not categories:
        return ""
    rows = []
    for name in categories:
        cells = "".join(_cell(method.categories.get(name)) for method in drafting)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    table = _table(("category", *(method.name for method in drafting)), rows, "Speed by category")
    return f"<h3>By category, against {escape(facts.reference)}</h3>\n{table}"


def tune_table(tune: Tune) -> str:
    """What was taken for each batch size."""
    rows = []
    for size, entry in sorted(tune.entries.items()):
        # The file does not tell how many prompts there were: too few to call anything proved.
        value, low, high = entry["measured"] or (0.0, 0.0, 0.0)
        measured = Estimate(value, low, high, MIN_PROMPTS - 1) if value else None
        nodes = f"{'up to ' * bool(entry['adaptive'])}{entry['max_nodes']}"
        predicted = f"<td>{entry['predicted']:.2f}x</td>"
        rows.append(
            f'<tr><th scope="row">{size}</th><td>{escape(str(entry["drafter"]))}</td><td>{nodes}</td>{predicted}'
            f"{_cell(measured)}</tr>"
        )
    heads = ("batch size", "drafter", "nodes", "predicted", "measured")
    return _table(heads, rows, "What the tuner took, against plain decoding")


def figures(trace: Trace | None, bench: Bench | None, tune: Tune | None) -> tuple[str, list[Missing]]:
    """All figures that the data allows, and those that it does not."""
    shown, missing = [], []
    with tempfile.TemporaryDirectory() as folder:
        for spec in FIGURES:
            try:
                light, dark = save(bound(spec, trace, bench, tune), Path(folder), spec.name, ("svg",))
            except MissingDataError as error:
                missing.append(Missing(spec.name, str(error)))
                continue
            assert spec.draw is not None
            about = escape(" ".join((spec.draw.__doc__ or spec.name).split()))
            shown.append(
                f'<figure tabindex="0" role="group" aria-label="{spec.name.replace("_", " ")}"><picture>'
                f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
                f'<img loading="lazy" width="1000" height="560" alt="{about}" src="{_inline(light)}"></picture></figure>'
            )
    return f'<div class="figures">{"".join(shown)}</div>' if shown else "", missing


def drill_down(trace: Trace, number: int) -> str:
    """The list of prompts; each one's steps are drawn when it is opened."""
    questions = drill.questions(trace)
    drafting = trace.drafting
    items, data = [], []
    for i, question in enumerate(questions):
        source = f"question-{number}-{i}"
        gains = {name: question["gains"][name] for name in drafting if name in question["gains"]}
        best = max(gains, key=lambda name: gains[name], default=None)
        gain = "" if best is None else f'<span class="gain">{escape(best)} {_gain(gains[best])}</span>'
        items.append(
            f'<details class="question" data-source="{source}" data-category="{escape(question["category"])}" '
            f'data-gain="{gains[best] if best else 0:.4f}"><summary><span>prompt {escape(question["id"])}</span>'
            f"<span>{escape(question['category'])}</span>{gain}</summary><div></div></details>"
        )
        data.append(f'<script type="application/json" id="{source}">{drill.script(question)}</script>')
    options = "".join(f"<option>{escape(name)}</option>" for name in trace.categories)
    texts = [{str(token): text for token, text in run.texts.items()} for run in trace.runs]
    return (
        f'<section data-drill="{number}">\n<h3 id="prompts-{number}">Prompt by prompt</h3>\n{_LEGEND}\n'
        '<div class="tools" hidden><label>search <input type="search"></label>'
        f'<label>category <select name="category"><option value="">all</option>{options}</select></label>'
        '<label>order <select name="order"><option>as run</option><option>slowest</option><option>fastest</option>'
        '</select></label><label class="check"><input type="checkbox"> show rejected drafts in the text</label>'
        '<span class="count note" role="status"></span></div>\n'
        "<noscript><p>Opening a prompt needs JavaScript; everything above does not.</p></noscript>\n"
        f'<div class="questions">{"".join(items)}</div>\n{"".join(data)}'
        f'<script type="application/json" id="texts-{number}">{drill.script(texts)}</script>\n</section>'
    )


def provenance(facts: Facts, number: int) -> str:
    """Everything that is known of the run, for whoever wants to do it again."""
    return (
        f'<h3 id="provenance-{number}">Provenance</h3>\n<details><summary>How this was measured</summary>'
        f"<dl>{_terms(facts.provenance)}</dl></details>"
    )


def missing_list(missing: Sequence[Missing]) -> str:
    if not missing:
        return ""
    items = "".join(f"<li>{escape(figure.name)}: needs {escape(figure.reason)}</li>" for figure in missing)
    return f"<details><summary>{len(missing)} figures were not drawn</summary><ul>{items}</ul></details>"


_LEGEND = (
    '<p class="legend"><span class="key accepted">drafted and accepted</span>'
    '<span class="key own">the target\'s own</span><span class="key rejected">drafted and rejected</span>'
    "<span>Point at a step, or move through steps with the arrow keys, to see its tree.</span></p>"
)


def _table(heads: Sequence[str], rows: Sequence[str], label: str) -> str:
    top = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in heads)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(estimate: Estimate | None) -> str:
    """A speed, coloured and said in words where its interval leaves no doubt."""
    if estimate is None:
        return NONE
    if estimate.num_prompts < 2 or estimate.low == estimate.high:
        return f"<td>{estimate.value:.2f}x</td>"
    kind = ("faster" if estimate.value > 1 else "slower") if is_proved(estimate) else ""
    word = f' class="{kind}" title="{kind}, proved on {estimate.num_prompts} prompts"' if kind else ""
    return f"<td><span{word}>{estimate.value:.2f}x</span> <small>[{estimate.low:.2f}, {estimate.high:.2f}]</small></td>"


def _gain(value: float) -> str:
    return f"{value:.2f}x"


def _inline(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _terms(content: Mapping[str, Any], prefix: str = "") -> str:
    terms = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            terms.append(_terms(value, f"{name}."))
        elif name != "type":
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            terms.append(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>")
    return "".join(terms)
