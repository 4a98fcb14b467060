"""benchmarks/gpu.py on a CPU: every section runs at toy size, so that it works on the day a GPU is there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_cases import kernel_cache, simulated  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("section", ["ceilings", "tests", "attention", "steps", "model", "end_to_end"])
@pytest.mark.usefixtures("simulated")
def test_a_section_runs_dry(
    section: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main([section, "--dry-run", "--output", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {section}
    assert not [row for row in rows if "Error" in row.get("noted", "")]
    assert all(row["status"] == 0 for row in rows if "status" in row)
    assert all(row["match"] for row in rows if "match" in row)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_all_sections_are_tried(script: ModuleType) -> None:
    assert list(script.SECTIONS) == ["ceilings", "tests", "attention", "steps", "model", "end_to_end"]


def test_the_cascade_is_attention(script: ModuleType) -> None:
    run = script.Run("cpu", True, 1)
    query, kv, mask = script.attention_inputs(run, 7, 90, 64, 4, 2)
    tree = script.attention.visible_slots(mask, 97)[0, :, 90:]
    expected = script.attention.tree_attention_torch(query, kv, mask, 0.2)
    torch.testing.assert_close(script.cascade(query, kv.keys, kv.values, tree, 90, 0.2), expected)


def test_a_deeper_model_is_the_same_function(script: ModuleType) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    deeper = script.inflated(model, 9)
    assert sum(p.numel() for p in deeper.parameters()) > 2 * sum(p.numel() for p in model.model.layers.parameters())
    assert torch.equal(deeper(ids).logits, model(ids).logits)


def test_without_a_gpu_the_script_says_how_to_try(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main(["steps", "--output", "x.json"])
    assert "--dry-run tries every section" in capsys.readouterr().err
