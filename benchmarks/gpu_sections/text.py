"""Text from the default model and from larger models of the same function, against generate()."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import specdec
from gpu_sections.passes import default_model
from gpu_sections.shapes import SHAPES, Shape, inflated
from gpu_sections.timing import Run, Timed
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.hub.load import load_tokenizer


def end_to_end(run: Run) -> None:
    """Greedy text as it is and at the sizes asked for: what is accepted stays, what a pass costs grows."""
    model = default_model(run)
    if run.is_dry:
        ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    else:
        text = "Write a Python function that reverses a list, then explain it line by line.\n"
        ids = load_tokenizer(DEFAULT_MODEL)(text, return_tensors="pt").input_ids.to(run.device)
    own = Shape.of(model.config)
    toy = {"toy": replace(own, hidden=2 * own.hidden, layers=own.layers + 1)}
    num_new = run.pick(256, 8)
    time_text(run, model, ids, num_new, "as it is")
    for name, shape in run.pick({size: SHAPES[size] for size in run.sizes}, toy).items():
        time_text(run, inflated(model, shape), ids, num_new, f"inflated to {name}")


def time_text(run: Run, model: Any, ids: torch.Tensor, num_new: int, what: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
    ways: dict[str, dict[str, Any]] = {"specdec, ngram": {}}
    if not run.is_dry:
        ways["specdec, ngram, CUDA graphs"] = {"cuda_graphs": True}
    plain = model.generate(ids, **options)
    methods: Timed = {"generate()": lambda: model.generate(ids, **options)}
    for name, more in ways.items():
        found = specdec.generate(model, ids, drafter="ngram", **more, **options)
        run.add("end_to_end", f"{what}, {name}: tokens", match=bool(torch.equal(plain, found)))
        methods[name] = lambda more=more: specdec.generate(model, ids, drafter="ngram", **more, **options)
    run.time("end_to_end", f"{num_new} tokens, {what}", methods)
