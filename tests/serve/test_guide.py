"""The guide's examples run as they stand, and its tables name what there is."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from served import Served, events_of
from tinychat import make_tokenizer

from specdec.serve.bodies import ChatBody, TextBody

GUIDE = (
    (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text("utf-8").split("## Handing a drafter to")[0]
)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engine = FakeEngine(make_tokenizer())
    with Served(engine, name="smollm2-135m") as server:
        yield server
    engine.close()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


def test_the_python_examples_run(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        exec(block.replace(ADDRESS, served.url), names)  # the documents are ours
    assert "completion_tokens=40" in capsys.readouterr().out
    assert len(names["answer"].choices[0].token_ids) == 12
    names["client"].close()


def test_the_curl_example_runs_whole_and_streamed(served: Served) -> None:
    (command,) = (block for block in blocks("sh") if block.startswith("curl"))
    command = command.replace(ADDRESS, served.url).replace("curl ", "curl -sN ")
    whole = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert json.loads(whole)["usage"]["completion_tokens"] == 40
    streamed = command.replace('"temperature"', '"stream": true, "temperature"')
    ran = subprocess.run(["bash", "-c", streamed], capture_output=True, text=True, check=True)
    assert list(events_of(ran.stdout))[-1] == "[DONE]"


def test_every_field_is_documented() -> None:
    fields = {*ChatBody.model_fields, *TextBody.model_fields}
    assert [name for name in fields if f"`{name}`" not in GUIDE] == []


def test_every_metric_is_documented(served: Served) -> None:
    """Longer names stand behind "..." beside the first of their kind."""
    names = set(re.findall(r"^# TYPE (\S+) ", served.ask("/metrics").text, re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    assert [name for name in names if f"`{name}`" not in GUIDE.replace("`...", "`vllm:spec_decode")] == []


def test_every_path_is_documented(served: Served) -> None:
    paths = set(served.ask("/openapi.json").json["paths"]) - {"/v1/models/{name}"}
    assert [path for path in paths if not re.search(rf"`(GET|POST) {path}`", GUIDE)] == []
