"""The example drafter of docs/drafters.md: exact, useful, and found through an entry point of another package."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.drafters import drafter_names, parse_drafter

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "repeat_drafter.py"
DOCUMENT = (ROOT / "docs" / "drafters.md").read_text("utf-8")
VOCAB = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts() -> dict[str, Any]:
    """Two left-padded prompts that repeat themselves."""
    ids = torch.tensor([[8, 9, 10, 8, 9, 10, 8, 9], [0, 0, 0, 5, 7, 5, 7, 5]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, loaded from its file."""
    spec = importlib.util.spec_from_file_location("repeat_drafter", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "repeat_drafter", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other package, installed: its module, and the entry points that the document tells it to declare."""
    (block,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    project = tomllib.loads(block)["project"]
    folder = tmp_path / f"repeat_drafter-{project['version']}.dist-info"
    folder.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (folder / "METADATA").write_text(metadata, "utf-8")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines), "utf-8")
    (tmp_path / "repeat_drafter.py").write_text(EXAMPLE.read_text("utf-8"), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "repeat_drafter", None)  # so that leaving forgets the module
    del sys.modules["repeat_drafter"]


def test_the_document_shows_the_example_as_it_is() -> None:
    code = EXAMPLE.read_text("utf-8")
    assert "```python\n" + code[code.index("@dataclass") :] + "```" in DOCUMENT


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_the_example_gives_the_tokens_of_generate(
    model: Any, prompts: dict[str, Any], example: ModuleType, num_tokens: int
) -> None:
    """Guards an index that misses a token or learns one twice: rows accept different numbers of tokens."""
    expected = model.generate(**prompts, max_new_tokens=40, do_sample=False)
    drafter = example.RepeatDrafter(num_tokens=num_tokens)
    got = specdec.generate(
        model, **prompts, max_new_tokens=40, do_sample=False, drafter=drafter, return_dict_in_generate=True
    )
    assert torch.equal(got.sequences, expected)
    assert got.stats.num_accepted_tokens > 0
    assert not drafter._after  # rows that left are forgotten


def test_what_the_example_knows_is_what_a_rescan_would_find(
    model: Any, prompts: dict[str, Any], example: ModuleType
) -> None:
    """Guards the incremental index against drifting from its definition."""
    drafter = example.RepeatDrafter()
    propose, seen = drafter.propose, 0

    class Watching:
        name = "watching"
        begin, observe, end = drafter.begin, drafter.observe, drafter.end

        def propose(self, rows: Any, limits: Any, params: Any, rng: Any) -> Any:
            nonlocal seen
            trees = propose(rows, limits, params, rng)
            for row, tree, limit in zip(rows, trees, limits, strict=True):
                *before, newest = row.tokens
                earlier = [i for i, token in enumerate(before) if token == newest]
                size = min(4, limit.depth, limit.nodes)
                draft = row.tokens[earlier[-1] + 1 :][:size] if earlier else []
                assert list(tree.tokens) == [newest, *draft]
                seen += len(draft)
            return trees

    specdec.generate(model, **prompts, max_new_tokens=30, do_sample=False, drafter=Watching())
    assert seen > 0


@pytest.mark.usefixtures("installed")
def test_another_package_adds_the_example_by_an_entry_point(model: Any, prompts: dict[str, Any]) -> None:
    assert drafter_names()[-1] == "repeat"
    assert parse_drafter("repeat:num_tokens=6") == ("repeat", {"num_tokens": 6})
    expected = model.generate(**prompts, max_new_tokens=20, do_sample=False)
    got = specdec.generate(model, **prompts, max_new_tokens=20, do_sample=False, drafter="repeat:num_tokens=6")
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"repeat.*Options: num_tokens"):
        specdec.generate(model, **prompts, max_new_tokens=4, do_sample=False, drafter="repeat:nonsense=1")


def test_without_that_package_the_name_is_unknown(model: Any) -> None:
    with pytest.raises(ValueError, match="no drafter is called 'repeat'"):
        specdec.generate(model, torch.tensor([[5, 9]]), max_new_tokens=4, drafter="repeat")
