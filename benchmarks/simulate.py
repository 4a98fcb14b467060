"""Compares drafters without a model, by replaying recorded greedy text: tokens a pass, tree sizes and host time.

    python benchmarks/simulate.py record RECORDING.json    # minutes: the default model over the built-in prompts
    python benchmarks/simulate.py run RECORDING.json       # seconds a drafter; the same numbers at every run
    python benchmarks/simulate.py run RECORDING.json --drafter ngram --drafter suffix:max_cached=0 --nodes 8
    python benchmarks/simulate.py run RECORDING.json --output benchmarks/simulation.json

Prompts are decoded one after another by one drafter object, as a server would. Every second prompt of each category is
of the half by which defaults were chosen (`tuning`), the others are `unseen`. What the replay cannot know: logits at
nodes off the recorded text, so drafters that learn from those learn less here than in a real run.

The speedups are modelled, for the two ends of what a pass of n nodes costs on a CPU in passes of one node; they leave
out host time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec.drafters import make_drafter
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.hub.load import load_model, load_tokenizer
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.records.prompts import BUILTIN, load_prompts, render_turns
from specdec.records.provenance import collect
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY
from specdec.tree import TokenTree
from specdec.verifiers import make_verifier

SCHEMA = 1
NUM_TOP = 8
NODES = (8, 16, 24)
DRAFTERS = (
    "ngram",
    "suffix",
    "suffix:max_cached=0",
    "recycling",
    "recycling:max_order=1",
    "recycling:max_order=1,num_successors=1",
    "hybrid:parts=ngram+recycling",
    "hybrid:parts=suffix+recycling",
    "ngram:min_prob=0.005,min_gain=0.0",
    "suffix:min_prob=0.005,min_gain=0.0",
    "recycling:min_prob=0.005,min_gain=0.0",
)
COST_NODES = (1, 8, 16, 24)
COSTS = {"bfloat16, 2 threads": (1.0, 1.1, 1.3, 1.4), "float32, 1 thread": (1.0, 1.7, 2.3, 2.5)}


@dataclass(frozen=True, slots=True)
class Recorded:
    """One prompt and its greedy answer."""

    id: str
    category: str
    prompt: list[int]
    answer: list[int]
    top: list[list[int]]  # for each token of the answer, the best tokens in its place
    log_probs: list[list[float]]


@dataclass(slots=True)
class Tally:
    """What one drafter did on some prompts."""

    num_steps: int = 0
    num_tokens: int = 0
    num_nodes: int = 0  # without roots
    costs: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COSTS, 0.0))
    steps_of: dict[str, list[int]] = field(default_factory=dict)  # category -> steps, tokens
    host_s: float = 0.0

    def add(self, category: str, num_nodes: int, num_tokens: int) -> None:
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.num_nodes += num_nodes
        for name, curve in COSTS.items():
            self.costs[name] += float(np.interp(num_nodes + 1, COST_NODES, curve))
        counts = self.steps_of.setdefault(category, [0, 0])
        counts[0] += 1
        counts[1] += num_tokens

    def summary(self) -> dict[str, Any]:
        return {
            "mean_acceptance_length": round(self.num_tokens / self.num_steps, 3),
            "nodes_a_step": round(self.num_nodes / self.num_steps, 2),
            "modelled_speedup": {name: round(self.num_tokens / cost, 3) for name, cost in self.costs.items()},
            "categories": {name: round(tokens / steps, 3) for name, (steps, tokens) in sorted(self.steps_of.items())},
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
        }


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All that these drafters ask of a target."""

    vocab_size: int


def record(path: Path, num_new: int, limit: int | None, dtype: str) -> None:
    """Decode the built-in prompts greedily and write what is needed to replay them."""
    model, tokenizer = load_model(DEFAULT_MODEL, dtype=dtype), load_tokenizer(DEFAULT_MODEL)
    rows = []
    for prompt in load_prompts(BUILTIN, limit=limit):
        ids = render_turns(tokenizer, prompt, [])
        text = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            out = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=num_new, do_sample=False)
            best = model(out).logits[0, len(ids) - 1 : -1].float().log_softmax(-1).topk(NUM_TOP)
        rows.append(
            {
                "id": prompt.question_id,
                "category": prompt.category,
                "prompt": ids,
                "answer": out[0, len(ids) :].tolist(),
                "top": best.indices.tolist(),
                "log_probs": [[round(value, 3) for value in values] for values in best.values.tolist()],
            }
        )
        print(f"{len(rows)} {prompt.category}", file=sys.stderr)
    facts = {"vocab_size": model.get_output_embeddings().weight.shape[0], "dtype": str(model.dtype).split(".")[-1]}
    path.write_text(json.dumps({"schema": SCHEMA, "model": DEFAULT_MODEL, **facts, "rows": rows}), "utf-8")


def read(path: Path) -> tuple[dict[str, Any], list[Recorded]]:
    """The facts and the rows of a recording.

    Raises:
        ValueError: not a recording of this schema.
    """
    data = json.loads(path.read_text("utf-8"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a recording of schema {SCHEMA}; make one with: simulate.py record {path}")
    return {key: value for key, value in data.items() if key != "rows"}, [Recorded(**row) for row in data["rows"]]


def halves(rows: Sequence[Recorded]) -> dict[str, list[Recorded]]:
    """Every second prompt of each category for choosing defaults, the others for reporting."""
    seen: dict[str, int] = {}
    parts: dict[str, list[Recorded]] = {"tuning": [], "unseen": []}
    for row in rows:
        seen[row.category] = seen.get(row.category, 0) + 1
        parts["tuning" if seen[row.category] % 2 else "unseen"].append(row)
    return parts


def replay(drafter: Drafter, rows: Sequence[Recorded], num_nodes: int, vocab_size: int) -> Tally:
    """Decode ``rows`` one after another as greedy verification would."""
    tally = Tally()
    logits = torch.full((num_nodes + 1, vocab_size), -torch.inf)
    for key, recorded in enumerate(rows):
        row = Row(key, list(recorded.prompt), len(recorded.prompt) + len(recorded.answer))
        drafter.begin([row])
        while row.num_left > 0:
            _step(drafter, row, recorded, num_nodes, logits, tally)
        drafter.end([row])
    return tally


def _step(drafter: Drafter, row: Row, recorded: Recorded, num_nodes: int, logits: torch.Tensor, tally: Tally) -> None:
    started = time.perf_counter()
    limit = Limit(row.num_left - 1, num_nodes)
    (tree,) = drafter.propose([row], [limit], GREEDY, PhiloxRng(0))
    tally.host_s += time.perf_counter() - started
    first = row.num_emitted
    nodes = accepted(tree, recorded.answer[first:])
    verdict = Verdict(nodes, tuple(recorded.answer[first : first + len(nodes)]))
    row.tokens += verdict.tokens
    row.num_new = len(nodes)
    row.num_steps += 1
    known = logits[: len(tree)].fill_(-torch.inf)  # off the text nothing is known
    for i, node in enumerate(nodes, first):
        known[node, recorded.top[i]] = torch.tensor(recorded.log_probs[i])
    started = time.perf_counter()
    drafter.observe([row], [tree], [verdict], [Scores(known)])
    tally.host_s += time.perf_counter() - started
    tally.add(recorded.category, len(tree) - 1, len(nodes))


def accepted(tree: TokenTree, text: Sequence[int]) -> tuple[int, ...]:
    """The path of ``tree`` that agrees with ``text``, root first."""
    below = {(parent, token): node for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True))}
    nodes = [0]
    for token in text[:-1]:  # the last one is the target's own
        node = below.get((nodes[-1], token))
        if node is None:
            break
        nodes.append(node)
    return tuple(nodes)


def run(path: Path, drafters: Sequence[str], budgets: Sequence[int], output: Path | None) -> None:
    """Replay every drafter at every budget on both halves; a table on stdout, everything to ``output``."""
    facts, recorded = read(path)
    target: Any = Vocabulary(facts["vocab_size"])
    context = DraftContext(target, make_verifier("match"))
    results = []
    print(f"{'drafter':42} {'half':6} nodes  tokens a pass  nodes a step  modelled speedups  host ms")
    for name in drafters:
        for half, rows in halves(recorded).items():
            for num_nodes in budgets if rows else ():
                tally = replay(make_drafter(name, context), rows, num_nodes, facts["vocab_size"])
                found = tally.summary()
                speedups = " ".join(f"{value:8.3f}" for value in found["modelled_speedup"].values())
                host_ms = tally.host_s / tally.num_steps * 1e3
                print(
                    f"{name:42} {half:6} {num_nodes:5} {found['mean_acceptance_length']:14.3f} "
                    f"{found['nodes_a_step']:13.2f} {speedups}  {host_ms:7.2f}",
                    flush=True,
                )
                results.append({"drafter": name, "half": half, "num_nodes": num_nodes, **found})
    if output is not None:
        head = json.dumps({"schema": SCHEMA, "provenance": _provenance(path, facts, recorded)}, indent=1)
        lines = ",\n  ".join(json.dumps(row) for row in results)  # a line each, for readable differences
        output.write_text(f'{head.removesuffix(chr(10) + "}")},\n "rows": [\n  {lines}\n ]\n}}\n', "utf-8")


def _provenance(path: Path, facts: dict[str, Any], recorded: Sequence[Recorded]) -> dict[str, Any]:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    library = [found.version for found in distributions(name="arctic-inference")]
    settings = {
        "recording_sha256": sha256,
        "arctic_inference": library[0] if library else None,
        "num_prompts": len(recorded),
        "num_top": NUM_TOP,
        "cost_nodes": COST_NODES,
        "costs": COSTS,
    }
    command = ["python", *sys.argv]
    target = {"id": facts["model"]}
    return collect(command, dtype=facts["dtype"], device="cpu", models={"target": target}, settings=settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("record", help="decode the built-in prompts with the default model")
    making.add_argument("recording", type=Path)
    making.add_argument("--max-new-tokens", type=int, default=128)
    making.add_argument("--dtype", default="bfloat16")
    making.add_argument("--limit", type=int, help="only the first so many prompts")
    running = commands.add_parser("run", help="replay a recording with several drafters")
    running.add_argument("recording", type=Path)
    running.add_argument("--drafter", action="append", help="name or name:option=value,...; may be given several times")
    running.add_argument("--nodes", type=int, nargs="+", default=NODES)
    running.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        record(given.recording, given.max_new_tokens, given.limit, given.dtype)
    else:
        torch.set_num_threads(1)
        run(given.recording, given.drafter or DRAFTERS, given.nodes, given.output)


if __name__ == "__main__":
    main()
