"""``specdec generate`` and ``specdec bench`` under grammars."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from json_grammars import END
from tinychat import Command, make_model, save, write_prompts

SCHEMA = {
    "type": "object",
    "properties": {"tone": {"enum": ["warm", "cold"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["tone", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"), make_model(eos=END))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def schema(tmp_path: Path) -> str:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return str(tmp_path / "schema.json")


def test_an_answer_matches_what_was_asked_for(command: Command, folder: str, schema: str, tmp_path: Path) -> None:
    def ask(*options: str) -> str:
        ran = command("generate", "abc", "--target", folder, "--threads", "1", *options)
        assert ran.status == 0, ran.err
        return ran.out.strip()

    jsonschema.validate(json.loads(ask("--json-schema", schema)), SCHEMA)
    assert ask("--choices", "yes,no,not now", "--temperature", "1") in ("yes", "no", "not now")
    assert ask("--regex", "[ab]{3}") in {a + b + c for a in "ab" for b in "ab" for c in "ab"}
    (tmp_path / "g.lark").write_text('start: "x" ("y" | "zz") "."\n')
    assert ask("--grammar", str(tmp_path / "g.lark"), "--drafter", "none") in ("xy.", "xzz.")


def test_a_text_that_was_cut_ends_with_status_1(command: Command, folder: str, schema: str) -> None:
    """What reads the output of a pipe must not take half of an object for a whole one."""
    ran = command("generate", "abc", "--target", folder, "--json-schema", schema, "--max-new-tokens", "5")
    assert ran.status == 1
    assert "ended before it was complete" in ran.err


def test_two_grammars_and_damaged_ones_are_refused(command: Command, folder: str, schema: str, tmp_path: Path) -> None:
    def error(*options: str) -> str:
        ran = command("generate", "abc", "--target", folder, *options)
        assert ran.status == 2
        return ran.error

    assert "--json-schema and --regex" in error("--json-schema", schema, "--regex", "a")
    assert "cannot read" in error("--json-schema", str(tmp_path / "none.json"))
    assert "unclosed group" in error("--regex", "(a")
    (tmp_path / "bad.json").write_text('{"type": ')
    assert "is no JSON" in error("--json-schema", str(tmp_path / "bad.json"))


def test_a_bench_compares_constrained_methods(command: Command, folder: str, schema: str, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", [{"prompt": "abc abc"}, {"prompt": "hello"}])
    output = tmp_path / "out.json"
    ran = command(
        "bench", "--target", folder, "--prompts", prompts, "--grammar", schema, "--max-new-tokens", "40", "--threads",
        "1", "--drafter", "grammar:base=hybrid", "--drafter", "ngram", "--no-accelerate", "--output", str(output),
    )  # fmt: skip
    assert ran.status == 0, ran.err
    rows = json.loads(output.read_text())["rows"]
    assert {row["method"] for row in rows} >= {"hf-generate", "plain", "grammar", "ngram"}
    assert all(row["match"]["identical"] == row["match"]["total"] for row in rows)
    grammar = next(row for row in rows if row["method"] == "grammar")
    assert grammar["mean_acceptance_length"] > 2
    assert "choose one" in command(
        "bench", "--target", folder, "--grammar", schema, "--synthetic-acceptance", "0.5"
    ).error  # fmt: skip
