"""benchmarks/gpu.py on a CPU: every section runs at toy size, so that it works on the day a GPU is there."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_cases import kernel_cache, simulated  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # dataclasses look their module up
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script that is run
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


SECTIONS = ["ceilings", "tests", "attention", "steps", "verdicts", "model", "captured", "end_to_end"]


@pytest.mark.parametrize("section", SECTIONS)
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
    assert all(row["rows_that_differ"] == 0 for row in rows if "rows_that_differ" in row)
    assert all(row["replays"] > row["recordings"] > 0 for row in rows if "recordings" in row)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_all_sections_are_tried(script: ModuleType) -> None:
    assert list(script.SECTIONS) == SECTIONS


def test_the_cascade_is_attention(script: ModuleType) -> None:
    from gpu_sections import attention as section

    query, kv, mask = section.attention_inputs(script.Run("cpu", True, 1), 7, 90, 64, 4, 2)
    tree = section.attention.visible_slots(mask, 97)[0, :, 90:]
    expected = section.attention.tree_attention_torch(query, kv, mask, 0.2)
    torch.testing.assert_close(section.cascade(query, kv.keys, kv.values, tree, 90, 0.2), expected)


def test_a_package_that_is_not_installed_is_told(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_sections import attention as section

    monkeypatch.setattr(section.importlib.util, "find_spec", lambda _: None)
    lacking = section.others_unavailable(script.Run("cuda", False, 1))
    assert list(lacking) == ["flashinfer"]
    assert "pip install flashinfer-python" in lacking["flashinfer"]


SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
GROWN = {
    "deeper": {"layers": 9},
    "wider": {"hidden": 200},
    "more channels": {"intermediate": 64},
    "more heads": {"heads": 20, "kv_heads": 5},
    "larger heads": {"head_dim": 24},
    "all at once": {"hidden": 100, "intermediate": 71, "layers": 3, "heads": 12, "kv_heads": 3, "head_dim": 16},
}


def tiny(dtype: torch.dtype, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=tied, rms_norm_eps=1e-2))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model.eval().to(dtype)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-5), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("name", GROWN)
def test_an_inflated_model_is_the_same_function(
    name: str, dtype: torch.dtype, tolerance: float, tied: bool, script: ModuleType
) -> None:
    """A padded norm divides by the larger size; a larger head turns and scales otherwise; the cost must be real.

    Norms and rotations run in float32 whatever the dtype.
    """
    from gpu_sections.shapes import Shape, inflated

    model = tiny(dtype, tied)
    large = inflated(model, replace(Shape.of(model.config), **GROWN[name]))
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = model(ids).logits
    torch.testing.assert_close(large(ids).logits, logits, rtol=tolerance, atol=tolerance)
    assert float(logits.detach().std()) > 0.3
    assert Shape.of(large.config) == replace(Shape.of(model.config), **GROWN[name])
    assert sum(p.numel() for p in large.parameters()) > sum(p.numel() for p in model.parameters())
    # Weights that meet zeros only are not zero themselves.
    assert float((large.model.layers[-1].mlp.gate_proj.weight == 0).double().mean()) < 0.01


@pytest.mark.parametrize("wrong", ["norm", "eps", "scale"])
def test_an_inflation_without_its_corrections_is_another_function(
    wrong: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_sections import shapes

    model = tiny(torch.float64)
    large = shapes.inflated(model, replace(shapes.Shape.of(model.config), **GROWN["all at once"]))
    if wrong == "norm":
        large.model.norm.weight.data.mul_((100 / 48) ** 0.5)
    elif wrong == "eps":
        for module in large.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon *= 100 / 48
    else:
        large.model.layers[0].self_attn.q_proj.weight.data.mul_(0.5**0.5)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    assert float((large(ids).logits - model(ids).logits).detach().abs().max()) > 1e-3


def test_a_shape_that_does_not_fit_is_refused(script: ModuleType) -> None:
    from gpu_sections.shapes import SHAPES, Shape, inflated

    model = tiny(torch.float32)
    own = Shape.of(model.config)
    with pytest.raises(ValueError, match="at least"):
        inflated(model, replace(own, hidden=20))
    with pytest.raises(ValueError, match="at least"):
        inflated(model, replace(own, kv_heads=3))
    with pytest.raises(ValueError, match="multiple of 8"):
        inflated(model, replace(own, head_dim=12))
    with pytest.raises(ValueError, match="Llama's kind"):
        inflated(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1, attention_bias=True)), own)
    default = Shape(576, 1536, 30, 9, 3, 64)
    for before, shape in pairwise([default, *SHAPES.values()]):
        assert all(getattr(shape, size) >= getattr(before, size) for size in ("hidden", "intermediate", "kv_heads"))
        assert shape.heads // shape.kv_heads >= 3
        assert shape.layers >= default.layers
        assert shape.head_dim % default.head_dim == 0


@pytest.mark.parametrize("rounds", [6, 20, 51])
def test_intervals_of_ratios_hold_the_median(rounds: int, script: ModuleType) -> None:
    """At least 95 of 100: with 400 trials a true 95 % gives fewer than 365 once in 10,000 runs."""
    from gpu_sections.timing import ratio

    chance, hits = random.Random(0), 0
    for _ in range(400):
        base = [math.exp(chance.gauss(0, 0.3)) for _ in range(rounds)]
        found = ratio([2 * b * math.exp(chance.gauss(0, 0.5)) for b in base], base)
        hits += found["low"] <= 2 <= found["high"]
        assert found["low"] <= found["ratio"] <= found["high"]
    assert hits >= 365


def test_alternatives_take_turns(script: ModuleType) -> None:
    run, calls = script.Run("cpu", False, 4), list[str]()
    run.time("s", "w", {name: (lambda name=name: calls.append(name)) for name in "abc"})
    assert "".join(calls[3:12]) == "abcbcacab"
    assert [sorted(row) for row in run.rows][1] == sorted(["section", "what", "us", "q1", "q3", "ratio", "low", "high"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["steps"], "--dry-run tries every section"),
        (["stepz", "--dry-run"], "unknown sections: stepz; there are ceilings"),
        (["--dry-run", "--sizes", "9b"], "unknown sizes: 9b; there are 1b, 3b, 8b"),
        (["--dry-run", "--rounds", "0"], "at least 1, got 0"),
    ],
)
def test_a_call_that_cannot_work_says_why(
    arguments: list[str],
    told: str,
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main([*arguments, "--output", "x.json"])
    assert told in capsys.readouterr().err
