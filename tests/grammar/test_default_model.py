"""Extraction in JSON with the default model: the tokens of transformers under the same library, in far fewer passes."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch

import specdec
from specdec.generation.constrained import model_compiler
from specdec.grammar.masks import GrammarProcessor

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "occupation": {"type": "string", "maxLength": 40},
        "is_retired": {"type": "boolean"},
    },
    "required": ["name", "age", "occupation", "is_retired"],
    "additionalProperties": False,
}
QUESTION = (
    "Extract the person as JSON: Maria Schmidt is a 34 year old carpenter who lives in Hamburg with her two sons."
)


@pytest.mark.model
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 3}]
)
def test_an_extraction_takes_less_than_half_of_the_passes(options: dict[str, Any]) -> None:
    model, tokenizer = specdec.load_model("smollm2-135m"), specdec.load_tokenizer("smollm2-135m")
    messages = [{"role": "user", "content": QUESTION}]
    ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 96, **options}
    out = specdec.generate(
        model, ids, grammar=specdec.Grammar.json_schema(SCHEMA), tokenizer=tokenizer, adaptive=False,
        return_dict_in_generate=True, **asked,
    )  # fmt: skip
    assert out.finish_reasons == ("stop",)
    jsonschema.validate(
        json.loads(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)), SCHEMA
    )
    if not options["do_sample"]:
        assert out.stats.mean_acceptance_length >= 2
        compiler = model_compiler(model, tokenizer, (tokenizer.eos_token_id,))
        processor = GrammarProcessor([compiler.start(specdec.Grammar.json_schema(SCHEMA))], compiler.ends)
        assert torch.equal(out.sequences, model.generate(ids, logits_processor=[processor], **asked))
