"""Whole verify passes of a model: transformers' attention, ours, and ours as a replayed graph, against the floor.

The floor is the time to read the weights and the kept keys and values once, at the rate at which memory is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_sections.timing import Run, Timed
from specdec.cuda.graphs import GraphedPasses, GraphPool, GraphRecorders
from specdec.cuda.recording import Recorder
from specdec.engine.attention import attention_copy
from specdec.engine.causal_lm import CausalLM
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.hub.load import load_model
from specdec.interfaces import Row
from specdec.tree import TokenTree

LLAMA_8B = (128256, 4096, 14336, 32, 32, 8)
TOY = (300, 128, 96, 2, 2, 1)


def llama_shaped(run: Run) -> Any:
    """Random weights in the shape of Llama-3.1-8B (toy: two tiny layers)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    sizes = dict(zip(names, run.pick(LLAMA_8B, TOY), strict=True))
    with torch.device(run.device):
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=65536)).to(run.dtype).eval()


def default_model(run: Run) -> Any:
    """The default model (toy: another two tiny layers)."""
    return llama_shaped(run) if run.is_dry else load_model(DEFAULT_MODEL, dtype=run.dtype, device=run.device)


class Passes:
    """An engine that has processed a prompt, for passes over trees that are never committed."""

    def __init__(self, model: Any, context: int, recorders: Callable[[], Recorder] | None = None) -> None:
        self.engine = CausalLM(model, replays=GraphPool(model, recorders) if recorders else None)
        self.row = Row(0, [7] * context, context + 999)
        self.engine.open([self.row])
        self.engine.score([self.row], [TokenTree((7,), (-1,))])
        self.engine.commit([self.row], [(0,)])
        self.row.tokens.append(7)

    def over(self, nodes: int) -> Callable[[], object]:
        tree = TokenTree((7, *range(8, 7 + nodes)), (-1, *((i - 1) // 2 for i in range(1, nodes))))
        return lambda: self.engine.score([self.row], [tree])

    def close(self) -> None:
        self.engine.close([self.row])

    def kept_bytes(self) -> int:
        """Bytes of the keys and values that a pass has to read."""
        share = (len(self.row.tokens) - 1) / self.engine._rows.cache.capacity
        return int(
            share * sum(t.numel() * t.element_size() for pair in self.engine._rows.cache.pairs if pair for t in pair)
        )


def floor_us(run: Run, model: Any, passes: Passes) -> float:
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if embedding.data_ptr() != model.get_output_embeddings().weight.data_ptr():
        del weights[embedding.data_ptr()]  # a few rows of it are read
    return round((sum(weights.values()) + passes.kept_bytes()) / run.gb_per_s() / 1e3, 1)


def model_steps(run: Run) -> None:
    """An 8B-shaped model with transformers' attention and with ours, both launched step by step."""
    model = llama_shaped(run)
    for context in run.pick((1024, 8192, 32768), (20,)):
        engines = {"ours": Passes(attention_copy(model), context), "transformers": Passes(model, context)}
        floor = floor_us(run, model, engines["ours"])
        for nodes in run.pick((1, 16, 64), (5,)):
            methods: Timed = {name: passes.over(nodes) for name, passes in engines.items()}
            run.time("model", f"{nodes} nodes, context {context}", methods, floor_us=floor)


def recorders_of(run: Run) -> Callable[[], Recorder]:
    """CUDA graphs, or in a dry run a recorder of the tests, whose folder gpu.py has put on the path."""
    if not run.is_dry:
        return GraphRecorders(torch.device("cuda", 0))
    from rerun import Rerun

    return Rerun


def captured_passes(run: Run) -> None:
    """The same pass launched step by step and replayed, for an 8B-shaped model and the default one."""
    recorders = recorders_of(run)
    for name, make in {"8B-shaped": llama_shaped, "default model": default_model}.items():
        model = attention_copy(make(run))
        for context in run.pick((1024, 8192, 32768) if make is llama_shaped else (512, 2048), (20,)):
            engines = {"captured": Passes(model, context, recorders), "eager": Passes(model, context)}
            floor = floor_us(run, model, engines["captured"])
            for nodes in run.pick((1, 8, 16, 64), (5,)):
                what = f"{name}, {nodes} nodes, context {context}"
                methods: Timed = {kind: passes.over(nodes) for kind, passes in engines.items()}
                medians = run.time("captured", what, methods, floor_us=floor)
                if "captured" in medians and not run.is_dry:
                    run.add("captured", f"{what}: against the floor", times=round(medians["captured"] / floor, 3))
            engines["captured"].close()  # cache and recordings stay for the next context
        report(run, name, engines["captured"].engine)


def report(run: Run, what: str, engine: CausalLM) -> None:
    """What the recordings cost, and whether anything was replayed at all."""
    found = engine.replay
    assert isinstance(found, GraphedPasses)
    facts = {"recordings": found.num_recordings, "replays": found.num_replays, "noted": found.fault or "none failed"}
    run.add("captured", f"{what}: recording", seconds=round(found.record_s, 3), mb=found.num_bytes >> 20, **facts)
