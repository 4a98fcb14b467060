"""Reports: one file that holds everything, says what the trace says, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec.analysis import report
from specdec.analysis.intervals import Estimate
from specdec.analysis.load import load
from specdec.analysis.report.facts import Facts, MethodFacts, facts_of_bench, facts_of_trace, summary
from specdec.analysis.results import Bench, load_result
from specdec.cli.main import app

DATA = Path(__file__).resolve().parents[2] / "notebooks" / "data"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium is not installed")


@pytest.fixture(scope="module")
def page() -> str:
    return report.build([DATA / "bench.jsonl", DATA / "bench.json"])


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "bench.jsonl").read_text("utf-8").splitlines()]


def cells(page: str, name: str) -> list[str]:
    """The texts of the first table row with this heading."""
    (row, *_) = re.findall(rf'<tr><th scope="row">{re.escape(name)}</th>(.*?)</tr>', page)
    return [unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", row)]


# ----- the numbers -----


def test_the_table_holds_what_the_trace_holds(page: str, lines: list[dict[str, Any]]) -> None:
    result = load_result(DATA / "bench.json")
    assert isinstance(result, Bench)
    for method in ("plain", "ngram", "recycling", "hybrid"):
        outputs = [line for line in lines if line["type"] == "output" and line["method"] == method]
        steps = [line for line in lines if line["type"] == "step" and line["method"] == method]
        to_plain, to_generate, rate, length, same, lossless = cells(page, method)
        row = result.row(method)
        assert to_generate == f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
        if method != "plain":
            low, high = row["speedup_vs_plain_low"], row["speedup_vs_plain_high"]
            assert to_plain == f"{row['speedup_vs_plain']:.2f}x [{low:.2f}, {high:.2f}]"
        assert rate == f"{sum(o['num_tokens'] for o in outputs) / sum(o['wall_s'] for o in outputs):.1f}"
        assert length == f"{1 + sum(s['num_accepted'] for s in steps) / len(steps):.2f}"
        texts = {(o["question_id"], o["turn"]): o["token_ids"] for o in lines if o.get("method") == "hf-generate"}
        equal = sum(o["token_ids"] == texts[o["question_id"], o["turn"]] for o in outputs)
        assert (same, lossless) == (f"{equal} of {len(outputs)}", "yes")


def test_a_trace_and_its_bench_result_say_the_same() -> None:
    result = load_result(DATA / "bench.json")
    assert isinstance(result, Bench)
    of_trace, of_bench = facts_of_trace(load(DATA / "bench.jsonl")), facts_of_bench(result)
    for one, other in zip(of_trace.methods, of_bench.methods, strict=True):
        assert (one.name, one.is_lossless, one.drafts) == (other.name, other.is_lossless, other.drafts)
        assert one.tokens_per_s == pytest.approx(other.tokens_per_s)
        assert one.vs_generate is not None
        assert other.vs_generate is not None
        assert one.vs_generate.value == pytest.approx(other.vs_generate.value)
        assert {name: each.value for name, each in one.categories.items()} == pytest.approx(
            {name: each.value for name, each in other.categories.items()}
        )


def test_every_step_is_in_the_drill_down(page: str, lines: list[dict[str, Any]]) -> None:
    scripts = re.findall(r'<script type="application/json" id="question-0-\d+">(.*?)</script>', page)
    found = [json.loads(text) for text in scripts]
    steps = [
        (question["id"], number, answer["name"], tuple(step[0]), tuple(step[1]), tuple(step[2]), tuple(step[3]))
        for question in found for number, turn in enumerate(question["turns"])
        for answer in turn["answers"] for step in answer.get("steps", ())
    ]  # fmt: skip
    lists = ("tokens", "nodes", "tree_tokens", "tree_parents")
    expected = [
        (line["question_id"], line["turn"], line["method"], *(tuple(line[key]) for key in lists))
        for line in lines if line["type"] == "step"
    ]  # fmt: skip
    assert sorted(steps) == sorted(expected)


# ----- the sentence -----


def facts(value: float, low: float, high: float, n: int = 20, **changes: Any) -> Facts:
    method = {"name": "eagle", "is_lossless": True, "drafts": True, "tokens_per_s": 9.0, "length": 2.0,
              "vs_generate": None, "vs_plain": Estimate(value, low, high, n), "same_text": (20, 20)}  # fmt: skip
    return Facts({}, (MethodFacts(**(method | changes)),))


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        (facts(2.1, 2.0, 2.2), "eagle is 2.10x [2.00, 2.20] as fast as plain decoding on this machine", "proved"),
        (facts(1.1, 0.9, 1.3), "No method is proved faster than plain decoding", "hurts"),
        (facts(0.8, 0.7, 0.9), "No method is faster than plain decoding: the best, eagle, is 0.80x", "proved"),
        (facts(2.1, 2.1, 2.1, n=1), "measured once: too little to conclude", "["),
        (facts(2.1, 1.9, 2.3, n=3), "No method is proved faster", "hurts"),
        (facts(2.1, 2.0, 2.2, drafts=False), "nothing to compare", "2.10x"),
        (facts(2.1, 2.0, 2.2, is_lossless=False), "nothing to compare", "2.10x"),
        (facts(2.1, 2.0, 2.2, categories={"qa": Estimate(0.8, 0.7, 0.9, 9)}), "It hurts on qa.", "chance"),
        (facts(2.1, 2.0, 2.2, categories={"qa": Estimate(0.8, 0.7, 0.9, 2)}), "which may be chance", "hurts"),
        (facts(2.1, 2.0, 2.2, categories={"qa": Estimate(0.9, 0.7, 1.1, 9)}), "which may be chance", "hurts"),
    ],
)
def test_the_sentence_claims_what_is_proved(given: Facts, said: str, unsaid: str) -> None:
    assert said in summary(given)
    assert unsaid not in summary(given)


def test_the_sentence_stands_first(page: str) -> None:
    body = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.split('<main id="main">')[1][:3000], flags=re.DOTALL)
    assert re.match(r"\s*specdec report\s+(No method is|\w+ is \d)", body)


# ----- the page -----


class Links(HTMLParser):
    """Everything that a page could fetch, its ids and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data") and value:
                self.urls.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag not in ("meta", "link", "input", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network() -> None:
    """With several chapters: ids that repeat would lead links to the wrong one."""
    page = report.build([DATA / "bench.json", DATA / "bench-b4.jsonl", DATA / "tuned.json"])
    links = Links()
    links.feed(page)
    assert links.open == []
    assert all(url.startswith(("data:", "#")) for url in links.urls)
    assert all(url[1:] in links.ids for url in links.urls if url.startswith("#"))
    assert len(links.ids) == len(set(links.ids))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML", page)


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    """Prompts and answers hold anything, code of pages too."""
    evil = '</script><img src=x onerror="alert(1)">'
    lines = [json.loads(line) for line in (DATA / "bench.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        if "category" in line:
            line["category"] = evil
        if line["type"] == "vocabulary":
            line["texts"] = dict.fromkeys(line["texts"], evil)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.build([path])
    assert "<img src=x" not in page
    links = Links()
    links.feed(page)
    assert links.open == []


def many(path: Path, times: int) -> Path:
    """The committed trace with its questions repeated under other names: 16 x ``times`` prompts."""
    lines = [json.loads(line) for line in (DATA / "bench.jsonl").read_text("utf-8").splitlines()]
    with path.open("w") as file:
        file.write(json.dumps(lines[0]) + "\n")
        for i in range(times):
            for line in lines[1:-1]:
                if "question_id" in line:
                    line = line | {"question_id": f"{line['question_id']}-{i}"}
                if "group" in line:
                    line = line | {"group": line["group"] + 16 * i}
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
        file.write(json.dumps(lines[-1]) + "\n")
    return path


PROBE = """<script>
const probe = { errors: [] };
addEventListener("error", (event) => probe.errors.push(String(event.message)));
addEventListener("load", () => setTimeout(async () => {
  const wait = () => new Promise((done) => setTimeout(done, 50));
  const timing = performance.getEntriesByType("navigation")[0];
  probe.loaded = timing.domContentLoadedEventEnd;
  const all = [...document.querySelectorAll(".question")];
  probe.questions = all.length;
  all[0].querySelector("summary").focus();
  probe.focusable = document.activeElement === all[0].querySelector("summary");
  all[0].open = true;
  await wait();
  const lines = [...all[0].querySelectorAll(".answer")];
  const steps = [...lines.at(-1).querySelectorAll(".step")];
  probe.answer = lines.at(-1).innerText;
  probe.reference = lines[0].innerText;
  steps[0].focus();
  steps[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  probe.moved = document.activeElement === steps[1];
  probe.detail = all[0].querySelector(".detail").innerText;
  const select = document.querySelector("select[name=category]");
  select.value = select.options[1].value;
  select.dispatchEvent(new Event("change"));
  probe.filtered = all.filter((each) => !each.hidden).length;
  probe.overflows = document.documentElement.scrollWidth > innerWidth + 1;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  probe.images = [...document.images].map((image) => [image.currentSrc.length > 0, image.complete]);
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(probe);
  document.body.append(out);
}, 100));
</script>"""


def probe(page: Path, tmp_path: Path, *, width: int) -> dict[str, Any]:
    """What the page does in a browser: errors, times, and what keys and filters bring about."""
    html = page.read_text("utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(html.replace("<style>", PROBE + "<style>", 1), "utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom",
         probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(unescape(found[1]))
    said["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return said


@in_browser
@pytest.mark.parametrize("width", [1200, 390], ids=["desk", "phone"])
def test_the_page_works_in_a_browser(page: str, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, "utf-8")
    said = probe(path, tmp_path, width=width)
    assert said["errors"] == []
    assert said["console"] == []
    assert said["questions"] == 16
    assert said["focusable"]
    assert said["moved"]
    assert "step 2 of" in said["detail"]
    assert said["answer"] == said["reference"]
    assert said["filtered"] == 2
    assert not said["overflows"]


@pytest.mark.slow
@in_browser
def test_480_prompts_open_quickly(tmp_path: Path) -> None:
    """The time is told, not asserted: machines differ. Every prompt must be there, and the first must open."""
    path = tmp_path / "report.html"
    path.write_text(report.build([many(tmp_path / "t.jsonl", 30)]), "utf-8")
    said = probe(path, tmp_path, width=1200)
    print(f"{path.stat().st_size / 1e6:.1f} MB, ready after {said['loaded']:.0f} ms")
    assert said["questions"] == 480
    assert said["errors"] == said["console"] == []
    assert "step 2 of" in said["detail"]


def test_runs_under_other_conditions_are_not_mixed() -> None:
    paths = [DATA / "bench.jsonl", DATA / "bench.json", DATA / "bench-b4.jsonl", DATA / "tuned.json"]
    found = report.chapters(map(str, paths))
    assert [(c.trace is not None, c.bench is not None, c.tune is not None) for c in found] == [
        (True, True, False), (True, False, False), (False, False, True),
    ]  # fmt: skip
    assert [len(c.trace.outputs) for c in found if c.trace] == [
        sum('"type":"output"' in line for line in path.read_text().splitlines())
        for path in paths
        if path.suffix == ".jsonl"
    ]


# ----- the command -----


def test_the_command_writes_one_file(tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    result = CliRunner().invoke(app, ["report", str(DATA / "tuned.json"), "--output", str(out)])
    assert result.exit_code == 0
    assert "What the tuner found" in out.read_text("utf-8")


def test_a_run_cut_short_is_reported_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    whole = (DATA / "bench.jsonl").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "r.html"
    result = CliRunner().invoke(app, ["report", str(path), "--output", str(out)])
    assert result.exit_code == 0, result.exception
    assert "warning" in result.stderr
    assert "of 16 questions" in re.search(r'<p class="warning">(.*?no end line.*?)</p>', out.read_text("utf-8"))[1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "name", "complaint"),
    [("x\n", "t.jsonl", "not a trace of specdec"), ("{}", "t.json", "no result of specdec"), ("", "t.txt", "empty")],
)
def test_foreign_files_are_refused_in_words(tmp_path: Path, content: str, name: str, complaint: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    result = CliRunner().invoke(app, ["report", str(path), "--output", str(tmp_path / "r.html")])
    assert isinstance(result.exception, ValueError)
    assert complaint in str(result.exception)
    assert not (tmp_path / "r.html").exists()


def test_the_report_never_overwrites_a_run(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes((DATA / "bench.jsonl").read_bytes())
    result = CliRunner().invoke(app, ["report", str(path), "--output", str(path)])
    assert "is one of the runs" in str(result.exception)
