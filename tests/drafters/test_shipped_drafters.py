"""The drafters that are shipped for the default model: found by name, exact, and worth their place."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from trained import tiny_target

import specdec
from specdec.drafters import make_drafter
from specdec.drafters.heads.shipped import SHIPPED
from specdec.engine.causal_lm import CausalLM
from specdec.errors import CheckpointError, UnsupportedModelError
from specdec.hub.catalog import is_fetched
from specdec.hub.load import load_model, load_tokenizer
from specdec.interfaces import DraftContext
from specdec.verifiers import make_verifier

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        not is_fetched("smollm2-135m"), reason="the default model is not here: specdec models fetch smollm2-135m"
    ),
]
QUESTIONS = ("What makes bread rise?", "Write a Python function that reverses the words of a sentence.")
SPECS = {
    "medusa": 1.3,
    "eagle": 1.6,
    "recycling": 1.6,
    "hybrid:parts=ngram+recycling+eagle": 1.7,
}  # tokens a pass, far below what they reach


@pytest.fixture(scope="module")
def target() -> tuple[Any, Any]:
    return load_model("smollm2-135m", dtype="float32", device="cpu"), load_tokenizer("smollm2-135m")


@pytest.mark.parametrize("spec", SPECS)
def test_they_write_what_generate_writes_in_fewer_passes(target: tuple[Any, Any], spec: str) -> None:
    model, tokenizer = target
    emitted, passes = 0, 0
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        mask = torch.ones_like(ids)
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
        output = specdec.generate(
            model, ids, attention_mask=mask, drafter=spec, max_new_tokens=40, do_sample=False, adaptive=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(output.sequences, expected)
        emitted += output.stats.num_tokens
        passes += output.stats.num_drafts
    assert emitted / passes > SPECS[spec]


@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_they_refuse_a_model_that_they_were_not_trained_for(name: str) -> None:
    other = CausalLM(tiny_target())
    with pytest.raises(UnsupportedModelError, match=f"specdec train {name}"):
        make_drafter(name, DraftContext(other, make_verifier("match")))


def test_the_start_table_is_taken_for_its_own_model_alone(target: tuple[Any, Any]) -> None:
    """Another model begins with an empty table, as does its own if told so; a table given by name must only fit."""
    rule, own, other = make_verifier("match"), CausalLM(target[0]), CausalLM(tiny_target())
    built: Any = make_drafter("recycling", DraftContext(own, rule))
    assert built.start.num_contexts > 100_000
    again: Any = make_drafter("recycling", DraftContext(own, rule))
    assert again.start is built.start  # read once
    for spec, engine in (("recycling:start=None", own), ("recycling", other)):
        cold: Any = make_drafter(spec, DraftContext(engine, rule))
        assert cold.start is None
    folder = SHIPPED / "smollm2-135m-recycling"
    with pytest.raises(CheckpointError, match="49152 token ids and the target has"):
        make_drafter(f"recycling:start={folder}", DraftContext(other, rule))


def test_they_are_small_and_say_what_they_were_trained_on() -> None:
    folders = [folder for folder in SHIPPED.iterdir() if folder.is_dir()]
    kinds = ("eagle3", "medusa", "recycling")
    assert sorted(folder.name for folder in folders) == [f"smollm2-135m-{kind}" for kind in kinds]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*")) < 25_000_000
    for folder in folders:
        facts = json.loads((folder / "training.json").read_text("utf-8"))["facts"]
        card = (folder / "README.md").read_text("utf-8")
        assert f"{facts['num_train_tokens']} training tokens" in card
        assert f"{facts['mean_acceptance_length']:.2f}" in card
        assert "license: apache-2.0" in card
