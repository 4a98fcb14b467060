"""The page at /: whole, within its policy, and working in a browser where there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from served import Served
from tinychat import TEMPLATE, make_tokenizer

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engine = FakeEngine(make_tokenizer(), pass_s=0.005, width=3)
    with Served(engine) as server:
        yield server
    engine.close()


class Elements(HTMLParser):
    """Ids, labels, and whatever could be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.fetched: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.labelled |= {given["for"]} if "for" in given else set()
        self.fetched += [given[name] for name in ("src", "href", "srcset", "action") if name in given]
        self.handlers += [name for name in given if name.startswith("on") or name == "style"]


def test_the_page_is_whole_and_fetches_nothing(served: Served) -> None:
    page = served.ask("/").text
    found = Elements()
    found.feed(page)
    assert len(found.ids) == len(set(found.ids))
    assert set(found.fetched) == {"data:,", "#question"}
    assert found.handlers == [], "the policy forbids handlers and styles in attributes"
    assert not re.search(r"url\(|@import|innerHTML|insertAdjacentHTML|eval\(|https?://", page)
    script = page.split("<script>")[1]
    assert set(re.findall(r'byId\("([\w-]+)"\)', script)) <= set(found.ids)


def test_the_policy_allows_this_code_and_no_other(served: Served) -> None:
    answer = served.ask("/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[kind] == f"'sha256-{digest}'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert served.ask("/", method="HEAD").status == 200


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_texts_can_be_read_on_their_grounds(served: Served) -> None:
    """4.5 to 1 is what WCAG 2 asks of text (AA)."""
    style = served.ask("/").text
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        pairs = [("ink", "ground"), ("soft", "ground"), ("ink", "panel"), ("on-strong", "strong"), ("rejected", "rejected-ground"),
                 ("ink", "accepted-ground"), ("ink", "own-ground"), ("ink", "rejected-ground")]  # fmt: skip
        for text, ground in pairs:
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


# A page that holds ours in a frame of the same origin cannot be had under its policy, so the driver is put into the
# script itself, with the policy's hash replaced: everything else is as served.
DRIVER = """
window.said = { errors: [], violations: [] };
addEventListener("error", (event) => said.errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => said.violations.push(event.violatedDirective));
addEventListener("load", async () => {
  // The browser's clock runs ahead of the server's, except while it waits for an answer.
  const wait = async (test) => { for (let i = 0; i < 4000 && !test(); i++) await fetch("health"); };
  const $ = (selector) => document.querySelector(selector);
  await wait(() => $("#model").textContent !== "connecting");
  said.model = $("#model").textContent;
  $("#question").value = "hello";
  $("#question").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
  await wait(() => $("#send").textContent === "Stop");
  await wait(() => $("#send").textContent === "Send" && $(".facts").textContent);
  const steps = [...document.querySelectorAll(".step")];
  said.steps = steps.length;
  said.text = $(".answer .text").textContent;
  said.facts = $(".answer .facts").textContent;
  said.perPass = $("#per-pass").textContent;
  said.kinds = [...steps[0].children].map((token) => token.className);
  steps[0].focus();
  steps[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  said.moved = document.activeElement === steps[1];
  said.title = $("#pass-title").textContent;
  said.tree = [...document.querySelectorAll("#pass-tree .key")].map((word) => word.className);
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  said.closed = $("#pass").hidden;
  said.tabStops = steps.filter((step) => step.tabIndex === 0).length;
  said.overflows = document.documentElement.scrollWidth > innerWidth;
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(said);
  document.body.append(result);
});
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium is not installed")
@pytest.mark.parametrize(("width", "template"), [(1280, TEMPLATE), (390, None)], ids=["desk", "phone, no template"])
def test_the_page_works_in_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, template: str | None
) -> None:
    from specdec.serve import page

    read = page._read
    monkeypatch.setattr(page, "_read", lambda name: read(name) + (DRIVER if name == "page.js" else ""))
    engine = FakeEngine(make_tokenizer(template=template), pass_s=0.005, width=3)
    with Served(engine) as server:
        assert CHROMIUM is not None
        ran = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
             f"--window-size={width},800", "--virtual-time-budget=20000", "--dump-dom", server.url],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    (found,) = re.findall(r'<pre id="result">(.*?)</pre>', ran.stdout, re.DOTALL)
    said: dict[str, Any] = json.loads(found)
    asked = engine.asked[0]
    engine.close()
    assert said["errors"] == said["violations"] == []
    assert said["model"] == "tiny"
    assert said["text"] == asked.text
    assert said["steps"] == len(asked.deltas) == -(-256 // 3)
    assert said["kinds"] == ["token accepted", "token accepted", "token own"]
    assert said["facts"].startswith(f"256 tokens · {len(asked.deltas)} passes · 2.98 tokens per pass")
    assert said["perPass"] == "2.98"
    assert (said["moved"], said["closed"], said["tabStops"], said["overflows"]) == (True, True, 1, False)
    assert said["title"] == f"Pass 2 of {len(asked.deltas)}"
    assert said["tree"] == ["key accepted", "key accepted", "key rejected"]
