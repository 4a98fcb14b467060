"""What the documents promise: links that resolve, commands that exist, code that runs, numbers that come from a file."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tinychat
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import specdec
from specdec.drafters import DRAFTERS
from specdec.verifiers import VERIFIERS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FORBIDDEN = r"issue #|/work/|/root/|pypi\.org|huggingface\.co/api|\bsessions?\b"
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    """The bodies of the fenced blocks in one of ``languages``; "" is a block that names none."""
    return [body for language, body in FENCED.findall(text) if language in languages]


# ----- links and words -----


def anchors(text: str) -> set[str]:
    """The fragments that headings can be linked by."""
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_relative_links_resolve(document: Path) -> None:
    text = document.read_text("utf-8")
    prose = FENCED.sub("", text)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        place = (document.parent / name).resolve() if name else document
        if not place.exists() or (fragment and fragment not in anchors(place.read_text("utf-8"))):
            broken.append(link)
    assert not broken


def test_every_committed_figure_and_result_is_used() -> None:
    """Guards against figures that no page shows and results that no text cites: megabytes whose use nobody can tell."""
    text = "".join(path.read_text("utf-8") for path in DOCUMENTS)
    files = [path for folder in ("docs/figures", "benchmarks") for path in (ROOT / folder).glob("*.*")]
    assert len(files) > 10
    assert not [path.name for path in files if path.name not in text]


@each_document
def test_no_words_of_the_workshop(document: Path) -> None:
    """Numbers of issues, paths of one machine and addresses of services mean nothing to a reader."""
    text = document.read_text("utf-8")
    assert not re.findall(FORBIDDEN, text, re.IGNORECASE)
    assert not re.search(r"[\w.+-]+@[\w-]+\.[a-z]{2,}", text)


def test_every_file_of_the_tree_is_there() -> None:
    """The README's tree names the folders of the project, and all of them."""
    (tree,) = (block for block in blocks((ROOT / "README.md").read_text("utf-8"), "") if "verifiers/ " in block)
    named = {line.split("/ ")[0] for line in tree.splitlines()}
    assert all((ROOT / name).is_dir() for name in named)
    packages = {path.parent.name for path in ROOT.glob("[a-z]*/__init__.py")}
    assert packages <= named


@pytest.mark.parametrize(
    ("document", "names"), [("drafters.md", DRAFTERS), ("verification.md", VERIFIERS)], ids=["drafters", "verifiers"]
)
def test_every_name_is_documented(document: str, names: dict[str, Any]) -> None:
    text = (ROOT / "docs" / document).read_text("utf-8")
    assert [name for name in names if f"`{name}`" not in text] == []


# ----- commands -----


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each ``specdec ...`` line in a block of commands and of each one quoted in the text."""
    shell = "".join(blocks(text, "", "sh", "bash", "console")).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in shell.splitlines()]
    lines += re.findall(r"`(specdec [^`\n]+)`", FENCED.sub("", text))
    for line in lines:
        if line.startswith("specdec "):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                words = line.split()
            yield [word for word in words[1:] if word != "..."]


def unknown_word(command: Any, words: list[str]) -> str | None:
    """The first subcommand or option that ``command``, a click command, does not have."""
    while words and getattr(command, "commands", None) and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return words[0]
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h"}
    options = [word.strip("[]").split("=")[0] for word in words if re.match(r"\[?--?[a-z]", word)]
    return next((option for option in options if option not in known), None)


def specdec_command() -> Any:
    typer = pytest.importorskip("typer.main")
    return typer.get_command(pytest.importorskip("specdec.cli.main").app)


@each_document
def test_commands_and_their_options_exist(document: Path) -> None:
    """Options that were renamed live on in documents."""
    command = specdec_command()
    lines = list(command_lines(document.read_text("utf-8")))
    assert {shlex.join(words): unknown_word(command, words) for words in lines if unknown_word(command, words)} == {}


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("nonesuch", "nonesuch"),
        ("models nonesuch", "nonesuch"),
        ("doctor --nonesuch", "--nonesuch"),
        ("generate hello --temperature 1 --nonesuch=3", "--nonesuch"),
        ("generate hello --temperature -1 --no-chat", None),
        ("models fetch", None),
        ("--version", None),
    ],
)
def test_that_check_finds_what_does_not_exist(line: str, unknown: str | None) -> None:
    text = f"Text with `specdec {line}` in it."
    assert [unknown_word(specdec_command(), words) for words in command_lines(text)] == [unknown]


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text("utf-8"), re.MULTILINE)) <= targets


# ----- code -----


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: needs no file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"])


def byte_model(*_: Any, **__: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("document", ["README.md", "docs/library.md"])
def test_the_code_of_a_document_runs(
    document: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one namespace, from top to bottom, as a reader would type it; with a tiny model for the built-in one."""
    monkeypatch.setattr(specdec, "load_model", byte_model)
    monkeypatch.setattr(specdec, "load_tokenizer", lambda _: byte_tokenizer())
    names: dict[str, Any] = {}
    code = blocks((ROOT / document).read_text("utf-8"), "python")
    for block in code:
        exec(compile(block, document, "exec"), names)  # the documents are ours
    assert capsys.readouterr().out
    model, inputs = names["model"], names["inputs"]
    expected = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert torch.equal(names["output"], expected)


@pytest.mark.usefixtures("one_thread")
def test_the_code_of_the_guide_to_grammars_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As above, with a tiny chat model that can end a text."""
    monkeypatch.setattr(specdec, "load_model", lambda _: tinychat.make_model(eos=256))
    monkeypatch.setattr(specdec, "load_tokenizer", lambda _: tinychat.make_tokenizer())
    names: dict[str, Any] = {}
    for block in blocks((ROOT / "docs" / "grammar.md").read_text("utf-8"), "python"):
        exec(compile(block, "docs/grammar.md", "exec"), names)  # the documents are ours
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("('stop',) {'tone': ")
    assert told[-1] == "True"


# ----- the table -----


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script() -> ModuleType:
    return load_script()


def result(**changes: Any) -> dict[str, Any]:
    """A small bench result with every kind of row."""
    numbers = {"tokens_per_s": 20.0, "num_prompts": 4}
    same = {"identical": 4, "total": 4, "explained": 0, "unexplained": 0, "compared_with": "hf-generate"}
    reference = {
        "method": "hf-generate",
        "speedup": 1.0,
        "mean_acceptance_length": 1.0,
        "match": {"total": 0},
        **numbers,
    }
    plain = {
        "method": "plain",
        "drafter": "none",
        "verifier": "match",
        "speedup": 0.99,
        "speedup_vs_plain": 1.0,
        "match": same,
        **numbers,
    }
    ngram = {
        "method": "ngram", "drafter": "ngram:max_order=3", "verifier": "match", "lossless": True, "tokens_per_s": 31.25,
        "speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6, "speedup_vs_plain": 1.52, "mean_acceptance_length": 1.75,
        "match": {**same, "identical": 2, "explained": 1, "unexplained": 1},
        "categories": {"chat": {"speedup": 0.97}, "code": {"speedup": 2.1}, "qa": {"speedup": 1.2}},
    }  # fmt: skip
    provenance = {
        "command": "specdec bench --output benchmarks/cpu-float32.json", "date": "2026-11-23T12:00:00Z",
        "commit": "0123456789abcdef", "dirty": True, "dtype": "float32", "device": "cpu", "threads": 2,
        "versions": {"specdec": "0.1.0", "torch": "2.13.0", "accelerate": None},
        "machine": {"cpu": "A Processor", "cores": 4, "usable_cores": 2, "gpus": []},
        "models": {"target": {"id": "smollm2-135m"}},
    }  # fmt: skip
    return {"schema": 1, "partial": False, "provenance": provenance, "rows": [reference, plain, ngram], **changes}


def test_a_table_is_rendered_with_its_conditions(script: ModuleType) -> None:
    lines = script.render(result()).splitlines()
    assert lines[2] == "| hf-generate | 20.0 | 1 | - | 1.00 | - |"
    assert lines[3] == "| plain | 20.0 | 0.99x | 1 | - | 4/4 |"
    assert lines[4] == (
        "| ngram:max_order=3 (match) | 31.2 | 1.50x (1.40 to 1.60) | 1.52x | 1.75 | 2/4, 1 explained, 1 unexplained |"
    )
    conditions = "\n".join(lines[5:])
    for fact in ("A Processor", "2 of 4 cores", "2 threads", "float32", "torch 2.13.0", "0123456789ab (changed since)"):
        assert fact in conditions
    for fact in ("2026-11-23", "smollm2-135m", "4 prompts", "`specdec bench --output benchmarks/cpu-float32.json`"):
        assert fact in conditions


def test_a_table_of_chosen_rows_holds_them_in_that_order(script: ModuleType) -> None:
    lines = script.render(result(), ["plain", "hf-generate"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| plain", "| hf-generate"]
    with pytest.raises(ValueError, match="has no row eagle; it has hf-generate, plain, ngram:max_order=3"):
        script.render(result(), ["eagle"])


def test_a_lossy_row_says_so_in_the_table(script: ModuleType) -> None:
    """A faster method that changes the text must not stand beside the others unmarked."""
    row = {**result()["rows"][2], "lossless": False}
    assert "(match, LOSSY)" in script.render(result(rows=[row]))


@pytest.mark.parametrize("changes", [{"schema": 2}, {"partial": True}], ids=str)
def test_no_table_is_made_of_what_is_unknown_or_cut_short(script: ModuleType, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"schema 1|interrupted"):
        script.render(result(**changes))


def test_a_workload_has_a_table_of_its_own(script: ModuleType) -> None:
    spread = {"mean": 0.3, "p50": 0.25, "p90": 0.5, "p99": 1.0}
    paged = {
        "engine": "paged", "drafter": "hybrid", "max_rows": 8, "tokens_per_s": 101.25, "first_token_s": spread,
        "inter_token_s": spread, "acceptance": {"mean_acceptance_length": 2.0}, "prefix_hit_rate": 0.875,
        "kv": {"utilisation": 0.9625}, "match": {"identical": 4, "total": 4, "compared_with": "hf-generate, one by one"},
    }  # fmt: skip
    other = {**paged, "engine": "hf", "drafter": None, "acceptance": None, "prefix_hit_rate": None, "kv": None}
    about = {"kind": "workload", "workload": {"num_requests": 4}, "rows": [paged, other]}
    lines = script.render(result(**about)).splitlines()
    assert lines[2] == "| paged + hybrid | 8 | 101.2 | 0.25, 1.00 | 250, 500, 1000 | 2.00 | 88% | 96.2% | 4/4 |"
    assert lines[3] == "| hf | 8 | 101.2 | 0.25, 1.00 | 250, 500, 1000 | - | - | - | 4/4 |"
    assert "4 prompts" in lines[5]
    assert len(script.render(result(**about), ["hf"]).splitlines()) == 5
    with pytest.raises(ValueError, match="no engine nosuch"):
        script.render(result(**about), ["nosuch"])


@pytest.mark.slow
def test_the_documented_commands_of_workloads_are_those_of_the_script() -> None:
    printed = subprocess.run(
        [sys.executable, "benchmarks/workloads.py", "list"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    text = (ROOT / "docs" / "workloads.md").read_text("utf-8")
    for line in printed.splitlines():
        command, _, output = line.partition(" --output ")
        assert f"`{Path(output).name}`" in text
        assert f"| `{command}` |" in text


def test_a_table_replaces_what_stands_between_its_markers(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result()))
    script.RESULTS = tmp_path
    start = "<!-- table:start r.json plain -->"
    text = f"before\n{start}\nold\n<!-- table:end -->\nafter\n"
    table = script.render(result(), ["plain"])
    assert script.fill(text) == f"before\n{start}\n{table}\n<!-- table:end -->\nafter\n"
    assert script.fill(script.fill(text)) == script.fill(text)
    with pytest.raises(ValueError, match="stands between"):
        script.fill("<!-- table:start r.json -->\nwithout an end")


def test_the_tables_of_the_documents_are_those_of_the_committed_results() -> None:
    """Numbers typed by hand, or of an older result."""
    script = load_script()
    for document in script.DOCUMENTS:
        text = document.read_text("utf-8")
        assert "<!-- table:start" in text
        assert script.fill(text) == text, "run: python benchmarks/tables.py"
