"""How fast answers in JSON are: plain constrained decoding, with drafts, and transformers under the same library.

    python benchmarks/grammar.py --output benchmarks/grammar.json

Extraction from short texts by the schemas of benchmarks/extraction.json. All methods take turns prompt by prompt, on the
same model and the same compiled grammars; their tokens are compared, and every answer is checked against its schema.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import torch

import specdec
from specdec.cli.loading import all_model_facts, eos_ids
from specdec.cli.measure import neutral_generation
from specdec.constraints import GrammarState
from specdec.generation.constrained import model_compiler
from specdec.grammar.inputs import Grammar
from specdec.grammar.masks import GrammarProcessor
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.hub.load import load_model, load_tokenizer
from specdec.records.files import write_json
from specdec.records.provenance import collect

HERE = Path(__file__).resolve().parent
PLAIN, TRANSFORMERS = "plain constrained", "transformers constrained"
DRAFTERS = {
    PLAIN: "none",
    "hybrid, masked": "hybrid",
    "forced tokens": "grammar",
    "forced tokens and ngram": "grammar:base=ngram",
    "forced tokens and hybrid": "auto",
}


@dataclass(frozen=True, slots=True)
class Task:
    """One text and what is to be found in it."""

    name: str
    schema: dict[str, Any]
    grammar: Grammar
    ids: torch.Tensor  # (1, L)


@dataclass(slots=True)
class Measured:
    """What one method did, answer by answer."""

    seconds: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_passes: list[int] = field(default_factory=list)
    num_identical: int = 0
    num_valid: int = 0
    num_cut: int = 0

    def add(self, seconds: float, new: Sequence[int], num_passes: int) -> None:
        self.seconds.append(seconds)
        self.num_tokens.append(len(new))
        self.num_passes.append(num_passes)


def load_tasks(tokenizer: Any, limit: int | None) -> list[Task]:
    """The tasks of the file, one of each schema in turn."""
    known = json.loads((HERE / "extraction.json").read_text("utf-8"))["tasks"]
    tasks = []
    for i in range(max(len(each["texts"]) for each in known)):
        for each in known:
            keys = ", ".join(each["schema"]["properties"])
            question = f"Extract the {each['name']} as JSON with {keys}.\n\n{each['texts'][i]}"
            messages = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            grammar = Grammar.json_schema(each["schema"])
            tasks.append(Task(each["name"], each["schema"], grammar, torch.tensor([list(ids)])))
    return tasks[:limit]


def methods(
    model: Any, tokenizer: Any, options: argparse.Namespace
) -> dict[str, Callable[[Task], tuple[list[int], int]]]:
    """From a task to its new tokens and the number of passes."""
    ends = tuple(sorted(eos_ids(model)))
    compiler = model_compiler(model, tokenizer, ends)
    common: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0}
    if options.temperature > 0:
        common |= {"temperature": options.temperature, "top_k": 0}

    def ours(drafter: str) -> Callable[[Task], tuple[list[int], int]]:
        def run(task: Task) -> tuple[list[int], int]:
            out = specdec.generate(
                model, task.ids, attention_mask=torch.ones_like(task.ids), grammar=task.grammar, tokenizer=tokenizer,
                drafter=drafter, max_nodes=options.max_nodes, accelerate=options.accelerate, seed=0,
                return_dict_in_generate=True, **common,
            )  # fmt: skip
            return out.sequences[0, task.ids.shape[1] :].tolist(), out.stats.num_drafts

        return run

    def transformers(task: Task) -> tuple[list[int], int]:
        processor = GrammarProcessor([compiler.start(task.grammar)], ends)
        mask = torch.ones_like(task.ids)
        out = model.generate(task.ids, attention_mask=mask, logits_processor=[processor], **common)
        new = out[0, task.ids.shape[1] :].tolist()
        return new, len(new)

    return {TRANSFORMERS: transformers, **{name: ours(drafter) for name, drafter in DRAFTERS.items()}}


def judge(tokenizer: Any, task: Task, new: Sequence[int], ends: frozenset[int], measured: Measured) -> None:
    """Whether the answer is whole, and then whether its schema allows it."""
    if new[-1] not in ends:
        measured.num_cut += 1
        return
    jsonschema.validate(json.loads(tokenizer.decode(new, skip_special_tokens=True)), task.schema)
    measured.num_valid += 1


def mask_costs(start: GrammarState, text: Sequence[int]) -> dict[str, float]:
    """Mean microseconds of a mask and of an accepted token along ``text``."""
    state, masks, accepts = start.fork(), list[float](), list[float]()
    for token in text:
        began = time.perf_counter()
        state.allowed()
        between = time.perf_counter()
        state.accept(token)
        masks.append(between - began)
        accepts.append(time.perf_counter() - between)
    return {"mask_us": 1e6 * float(np.mean(masks)), "accept_us": 1e6 * float(np.mean(accepts))}


def speedup(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Ratio of the summed times, and its 95 % interval over the prompts."""
    a, b = np.asarray(base), np.asarray(other)
    picks = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    low, high = np.percentile(a[picks].sum(1) / b[picks].sum(1), [2.5, 97.5])
    return {"speedup": float(a.sum() / b.sum()), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--max-nodes", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-accelerate", dest="accelerate", action="store_false")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options.target, dtype=options.dtype, device="cpu")
    tokenizer, ends = load_tokenizer(options.target), eos_ids(model)
    tasks = load_tasks(tokenizer, options.limit)
    found: dict[str, Measured] = {}
    with neutral_generation(model, ends):
        asked = methods(model, tokenizer, options)
        for run in asked.values():
            run(tasks[0])
        for number, task in enumerate(tasks):
            names = list(asked)[number % len(asked) :] + list(asked)[: number % len(asked)]
            outputs: dict[str, list[int]] = {}
            for name in names:
                began = time.perf_counter()
                outputs[name], num_passes = asked[name](task)
                measured = found.setdefault(name, Measured())
                measured.add(time.perf_counter() - began, outputs[name], num_passes)
                judge(tokenizer, task, outputs[name], ends, measured)
            for name in names:
                found[name].num_identical += outputs[name] == outputs[PLAIN]
            print(f"{number + 1} of {len(tasks)}", file=sys.stderr, flush=True)
        compiler = model_compiler(model, tokenizer, tuple(sorted(ends)))
        costs = mask_costs(compiler.start(tasks[-1].grammar), outputs[PLAIN][:-1])
    rows = {}
    for name in asked:
        each = found[name]
        rows[name] = {
            "drafter": DRAFTERS.get(name),
            "tokens_per_s": sum(each.num_tokens) / sum(each.seconds),
            "tokens_per_pass": sum(each.num_tokens) / sum(each.num_passes),
            "vs_plain": speedup(found[PLAIN].seconds, each.seconds),
            "vs_transformers": speedup(found[TRANSFORMERS].seconds, each.seconds),
            "num_identical": each.num_identical,
            "num_valid": each.num_valid,
            "num_cut": each.num_cut,
            "num_prompts": len(tasks),
        }
        print(
            f"{name}: {rows[name]['tokens_per_s']:.1f} tokens/s, {rows[name]['tokens_per_pass']:.2f} tokens a pass, "
            f"{rows[name]['vs_plain']['speedup']:.2f}x plain, {rows[name]['vs_transformers']['speedup']:.2f}x "
            f"transformers, {each.num_identical} of {len(tasks)} identical, {each.num_valid} valid, {each.num_cut} cut"
        )
    provenance = collect(
        [Path(sys.executable).name, *sys.argv],
        dtype=options.dtype,
        device="cpu",
        models=all_model_facts(options.target, ()),
        settings={key: str(value) for key, value in vars(options).items() if key != "output"},
    )
    write_json(options.output, {"kind": "grammar", "provenance": provenance, "masks": costs, "rows": rows})


if __name__ == "__main__":
    main()
