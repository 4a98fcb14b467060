"""Which way of drafting and verifying accepts most, on a real pair of models at temperature 1.

    python benchmarks/draft_pair.py --drafter-model DIR --output benchmarks/draft-pair.json

Two draft models are tried: the one named (such as what `specdec train draft` makes), and the target's own weights
rounded to 4 bits, a nearly perfect draft. First the chance that one of k siblings is accepted, at positions of text
that the target wrote; then mean acceptance lengths of whole runs, chains against trees, every rule exact.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec.budget.adaptive import FixedBudget
from specdec.cli.loading import all_model_facts, eos_ids
from specdec.distributions import WarperTransform
from specdec.drafters.trees.expansion import ChildSampling, Shape
from specdec.drafters.trees.growth import TreeBuilder
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.hub.load import load_model, load_tokenizer
from specdec.interfaces import Limit, Row, Scores
from specdec.records.files import write_json
from specdec.records.prompts import BUILTIN, load_prompts, render_turns
from specdec.records.provenance import collect
from specdec.rng import PhiloxRng
from specdec.runtime import Runtime
from specdec.sampling import SamplingParams
from specdec.stats import Stats
from specdec.tune.setting import Setting
from specdec.verifiers import make_verifier

RULES = {
    "rule 6 (top k-1 plus one draw)": (ChildSampling.TOP_PLUS_ONE, "rejection"),
    "rule 5 (without replacement)": (ChildSampling.WITHOUT_REPLACEMENT, "rejection"),
    "MSS (with replacement)": (ChildSampling.INDEPENDENT, "rejection"),
    "top-k": (ChildSampling.CERTAIN, "match"),
    "coupled": (ChildSampling.COUPLED, "match"),
}
RUNS = {  # levels of drafting and nodes; every tree has as many levels as the chain beside it
    "chain of 4, rejection": ("model:shape=chain,num_tokens=4,min_confidence=0.0,children=independent", "rejection", 4),
    "chain of 4, block": ("model:shape=chain,num_tokens=4,min_confidence=0.0,children=independent", "block", 4),
    "chain of 4, coupled": ("model:shape=chain,num_tokens=4,min_confidence=0.0,children=coupled", "match", 4),
    "tree 4x2x1x1 rule 5": ("model:shape=4x2x1x1,children=without_replacement", "rejection", 28),
    "tree 4x2x1x1 rule 6": ("model:shape=4x2x1x1,children=top_plus_one", "rejection", 28),
    "tree 4x2x1x1 MSS": ("model:shape=4x2x1x1,children=independent", "rejection", 28),
    "tree 4x2x1x1 rule 5, traversal": ("model:shape=4x2x1x1,children=without_replacement", "traversal", 28),
    "tree 2x2x1x1 rule 5": ("model:shape=2x2x1x1,children=without_replacement", "rejection", 14),
    "tree 2x2x1x1 rule 6": ("model:shape=2x2x1x1,children=top_plus_one", "rejection", 14),
    "best-first, coupled": ("model:shape=best-first,num_tokens=4,top_k=4,children=coupled", "match", 14),
}


@torch.no_grad()
def rounded(model: Any, bits: int = 4, group: int = 32) -> Any:
    """A copy whose linear weights are rounded to ``bits`` in groups of ``group``, each with a scale of its own."""
    small = copy.deepcopy(model)
    top = 2 ** (bits - 1) - 1
    for module in small.modules():
        if isinstance(module, torch.nn.Linear) and module is not small.get_output_embeddings():
            parts = module.weight.view(-1, group)
            scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
            parts.copy_((parts / scale).round() * scale)
    return small


def first_level(
    target: Any, draft: Any, texts: Sequence[list[int]], every: int, num_draws: int
) -> dict[str, dict[str, float]]:
    """The chance that one of k siblings is accepted, by k and rule."""
    params, logits_transform = SamplingParams(1.0), WarperTransform(SamplingParams(1.0))
    accepted: dict[str, dict[str, list[float]]] = {}
    for number, (text, start) in enumerate(texts_and_starts(texts)):
        with torch.no_grad():
            ids = torch.tensor([text])
            p, q = (model(input_ids=ids, use_cache=False).logits[0] for model in (target, draft))
        for position in range(start, len(text), every):
            row = Row(number, text[: position + 1], position + 40)
            for k in (1, 2, 4):
                for name, (children, rule) in RULES.items():
                    hits = 0
                    for draw in range(num_draws):
                        rng = PhiloxRng(draw).at(row.key, len(row.tokens))
                        tree = TreeBuilder(row, Limit(1, k), Shape((k,)), children, params, rng)
                        tree.expand(q[position : position + 1])
                        proposal = tree.proposal()
                        scores = Scores(p[position : position + 1].expand(len(proposal), -1))
                        probs = logits_transform.target_probs(row, proposal, scores)
                        hits += make_verifier(rule).verify(proposal, probs, rng).num_accepted > 0
                    accepted.setdefault(str(k), {}).setdefault(name, []).append(hits / num_draws)
    return {k: {name: float(np.mean(each)) for name, each in rules.items()} for k, rules in accepted.items()}


def texts_and_starts(texts: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    return [(text, len(text) // 2) for text in texts]


def lengths(runtime: Runtime, prompts: Sequence[list[int]], num_tokens: int, ends: frozenset[int]) -> Any:
    """Mean acceptance length and seconds a step of whole runs, all runs prompt by prompt in turn."""
    params = SamplingParams(1.0)
    made = {}
    for name, (spec, rule, nodes) in RUNS.items():
        setting = Setting(runtime, make_verifier(rule), params, ends, num_tokens)
        made[name] = (setting.decoder(setting.drafter(spec), FixedBudget(nodes)), Stats(), nodes)
    seconds = dict.fromkeys(made, 0.0)
    per_prompt: dict[str, list[float]] = {name: [] for name in made}
    for number, ids in enumerate(prompts):
        for name, (decoder, stats, _) in made.items():
            own = Stats()
            started = time.perf_counter()
            for emission in decoder.run([Row(number, list(ids), len(ids) + num_tokens)]):
                stats.add(emission.step)
                own.add(emission.step)
            seconds[name] += time.perf_counter() - started
            per_prompt[name].append(own.mean_acceptance_length)
        print(f"{number + 1} of {len(prompts)}", file=sys.stderr, flush=True)
    return {
        name: {
            "max_nodes": nodes,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "interval": interval(per_prompt[name]),
            "accepted_per_pos": stats.acceptance_rate_per_pos,
            "ms_a_step": 1000 * seconds[name] / max(stats.num_drafts, 1),
        }
        for name, (_, stats, nodes) in made.items()
    }


def interval(values: Sequence[float]) -> list[float]:
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    return [float(x) for x in np.percentile(np.asarray(values)[picks].mean(1), [2.5, 97.5])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=DEFAULT_MODEL)
    parser.add_argument("--drafter-model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--every", type=int, default=8, help="positions of the written text to look at")
    parser.add_argument("--draws", type=int, default=8, help="a position, for each rule and number of siblings")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model = load_model(options.target, dtype=options.dtype, device="cpu")
    tokenizer, ends = load_tokenizer(options.target), eos_ids(model)
    drafts = {
        "distilled": load_model(options.drafter_model, dtype=options.dtype, device="cpu"),
        "4-bit copy": rounded(model),
    }
    known = load_prompts(BUILTIN)
    chosen = [known[i * len(known) // options.limit] for i in range(options.limit)]
    prompts = [list(render_turns(tokenizer, prompt, [])) for prompt in chosen]
    setting = Setting(
        Runtime(model, accelerate=True), make_verifier("match"), SamplingParams(1.0), ends, options.max_new_tokens
    )
    rows = setting.rows(prompts)
    for _ in setting.decoder(setting.drafter("none"), FixedBudget(0)).run(rows):
        pass
    found: dict[str, Any] = {}
    for name, draft in drafts.items():
        print(name, file=sys.stderr, flush=True)
        one = first_level(model, draft, [row.tokens for row in rows], options.every, options.draws)
        runs = lengths(Runtime(model, (draft,), accelerate=True), prompts, options.max_new_tokens, ends)
        found[name] = {"first_level": one, "runs": runs}
        for k, rules in one.items():
            print(f"{name}, {k} siblings: " + ", ".join(f"{rule} {rate:.3f}" for rule, rate in rules.items()))
        for run, facts in runs.items():
            print(
                f"{name}, {run}: {facts['mean_acceptance_length']:.2f} {facts['interval']} {facts['ms_a_step']:.0f} ms"
            )
    provenance = collect(
        [Path(sys.executable).name, *sys.argv],
        dtype=options.dtype,
        device="cpu",
        models=all_model_facts(options.target, ()),
        settings={key: str(value) for key, value in vars(options).items() if key != "output"},
    )
    write_json(options.output, {"kind": "draft_pair", "provenance": provenance, "drafts": found})


if __name__ == "__main__":
    main()
