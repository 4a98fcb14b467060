"""What the kernels bring on a GPU, in sections that each stay below ten minutes; a plain table comes last.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py attention steps --output gpu.json
    python benchmarks/gpu.py --dry-run --output /dev/null

``--dry-run`` runs every section on a CPU at toy size, through the simulator if there is a g++: its times mean nothing.
Times are medians over interleaved rounds; ``noted`` says why something was left out.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.files import write_json
from specdec.grouped_attention import use_kernels
from specdec.interfaces import Row
from specdec.kernels import attention, simulator
from specdec.kernels.attention import KVView, TreeMask
from specdec.kernels.commit import KVBuffers, commit_kv, commit_kv_torch
from specdec.kernels.noise import NoiseKeys
from specdec.kernels.pick import Filters, pick_rows, pick_rows_torch
from specdec.kernels.reject import DraftTree, reject_tree, reject_tree_torch
from specdec.kernels.walk import walk_tree, walk_tree_torch
from specdec.models import DEFAULT_MODEL
from specdec.provenance import collect
from specdec.target import CausalLM
from specdec.tree import TokenTree

ROOT = Path(__file__).resolve().parent.parent
Timed = dict[str, Callable[[], object]]


@dataclass
class Run:
    """One call of the script: where it runs, at which sizes, and what it has found."""

    device: str
    is_dry: bool
    rounds: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def pick(self, real: Any, toy: Any) -> Any:
        return toy if self.is_dry else real

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_dry else torch.bfloat16

    def add(self, section: str, what: str, **numbers: Any) -> None:
        self.rows.append({"section": section, "what": what, **numbers})
        print(section, what, *(f"{key}={value}" for key, value in numbers.items()), file=sys.stderr)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, section: str, what: str, methods: Timed, **facts: Any) -> dict[str, float]:
        """Medians in microseconds; methods take turns. One that raises is noted and left out."""
        usable: Timed = {}
        for name, method in methods.items():
            try:
                method()
                self.sync()
                usable[name] = method
            except Exception as error:  # other packages' kernels raise what they like
                self.add(section, f"{what}: {name}", noted=f"{type(error).__name__}: {str(error)[:200]}")
        found: dict[str, list[float]] = {name: [] for name in usable}
        for _ in range(self.rounds):
            for name, method in usable.items():
                found[name].append(self._once(method))
        medians = {name: statistics.median(times) for name, times in found.items()}
        for name, median in medians.items():
            self.add(section, f"{what}: {name}", us=round(median, 2), **facts)
        return medians

    def _once(self, method: Callable[[], object]) -> float:
        if self.device != "cuda":
            started = time.perf_counter()
            method()
            return (time.perf_counter() - started) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        method()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def graphed(self, method: Callable[[], object]) -> Callable[[], object]:
        """``method`` as a replayed graph (on a CPU: itself)."""
        if self.device != "cuda":
            return method
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            method()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            method()
        return graph.replay


# ----- sections -----


def ceilings(run: Run) -> None:
    """What the device can do: bytes copied, and multiplications."""
    size = run.pick(1 << 30, 1 << 16)
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    us = run.time("ceilings", "copy", {"copy_": lambda: target.copy_(source)})["copy_"]
    run.add("ceilings", "copy rate", gb_per_s=round(2 * size / us / 1e3, 1))
    n = run.pick(8192, 64)
    a, b = run.randn(n, n), run.randn(n, n)
    us = run.time("ceilings", "product of matrices", {"matmul": lambda: a @ b})["matmul"]
    run.add("ceilings", "product rate", tflop_per_s=round(2 * n**3 / us / 1e6, 2))


def tests(run: Run) -> None:
    """The GPU tests, then the same below compute-sanitizer."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels_gpu.py"]
    if run.is_dry:
        command += ["-k", "moved"]
    checkers = {
        "plain": [],
        **{t: ["compute-sanitizer", "--tool", t, "--error-exitcode", "9"] for t in ("memcheck", "racecheck")},
    }
    for name, prefix in checkers.items():
        if prefix and (run.is_dry or shutil.which(prefix[0]) is None):
            run.add("tests", name, noted="compute-sanitizer was not found" if not run.is_dry else "needs a GPU")
            continue
        done = subprocess.run([*prefix, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
        run.add("tests", name, status=done.returncode, last=(done.stdout.strip().splitlines() or [""])[-1])


def attention_inputs(
    run: Run, nodes: int, context: int, size: int, heads: int, group: int
) -> tuple[Tensor, KVView, TreeMask]:
    query = run.randn(1, nodes, heads, size)
    keys, values = (run.randn(1, heads // group, context + nodes, size) for _ in range(2))
    tree = torch.eye(nodes, dtype=torch.bool, device=run.device)
    tree[:, 0] = True  # a root and its children
    lengths = torch.tensor([context], dtype=torch.int32, device=run.device)
    pages = torch.zeros(1, 1, dtype=torch.int32, device=run.device)
    return query, KVView(keys, values, pages), TreeMask(lengths, attention.pack_mask(tree[None]), nodes)


def cascade(query: Tensor, keys: Tensor, values: Tensor, tree: Tensor, context: int, scale: float) -> Tensor:
    """Prefix without a mask and the tree's own block, merged by their log-sum-exp: the best of plain torch."""
    batch, nodes, heads, size = query.shape
    group = heads // keys.shape[1]
    rows = query.view(batch, nodes, -1, group, size).permute(0, 2, 1, 3, 4).reshape(batch, -1, nodes * group, size)
    if query.is_cuda:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, before_lse = flash(rows, keys[:, :, :context], values[:, :, :context], scale=scale)[:2]
    scores = (rows @ keys[:, :, context:].transpose(2, 3)).float() * scale
    scores = scores.masked_fill(~tree.repeat_interleave(group, 0), -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    behind = (scores - lse).exp().to(query.dtype) @ values[:, :, context:]
    share = torch.sigmoid(before_lse.view(lse.shape).float() - lse)
    merged = (before.float() * share + behind.float() * (1 - share)).to(query.dtype)
    return merged.view(batch, -1, nodes, group, size).permute(0, 2, 1, 3, 4).reshape(query.shape)


def flex(run: Run, query: Tensor, kv: KVView, mask: TreeMask, scale: float) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = attention.visible_slots(mask, kv.keys.shape[2])[0]
    blocks = create_block_mask(
        lambda b, h, q, k: visible[q, k], None, None, query.shape[1], kv.keys.shape[2], device=run.device
    )
    compiled = torch.compile(flex_attention)
    turned = query.transpose(1, 2).contiguous()
    return lambda: compiled(turned, kv.keys, kv.values, block_mask=blocks, scale=scale, enable_gqa=True)


def attentions(run: Run) -> None:
    """Our kernel against what torch and transformers offer, over tree sizes and contexts."""
    for size, group in run.pick(((128, 4), (64, 3), (128, 1), (128, 8)), ((64, 2),)):
        heads = group * run.pick(8, 1)
        for nodes in run.pick((8, 16, 32, 64, 128), (5,)):
            for context in run.pick((1024, 4096, 8192, 16384, 32768), (300,)):
                attention_point(run, nodes, context, size, heads, group)


def attention_point(run: Run, nodes: int, context: int, size: int, heads: int, group: int) -> None:
    query, kv, mask = attention_inputs(run, nodes, context, size, heads, group)
    visible = attention.visible_slots(mask, kv.keys.shape[2])[:, None]
    scale, turned = size**-0.5, query.transpose(1, 2)
    new = [buffer[:, :, context:] for buffer in (kv.keys, kv.values)]
    old = [buffer[:, :, :context] for buffer in (kv.keys, kv.values)]
    sdpa = nn.functional.scaled_dot_product_attention

    def as_transformers() -> Tensor:
        keys, values = (torch.cat(pair, 2).repeat_interleave(group, 1) for pair in zip(old, new, strict=True))
        return sdpa(turned, keys, values, visible, scale=scale)

    methods: Timed = {
        "ours": run.graphed(lambda: attention.tree_attention(query, kv, mask, scale)),
        "transformers": as_transformers,
        "sdpa, static cache": lambda: sdpa(turned, kv.keys, kv.values, visible, scale=scale, enable_gqa=True),
        "cascade": lambda: cascade(query, kv.keys, kv.values, visible[0, 0, :, context:], context, scale),
    }
    if not run.is_dry:
        lazily: list[Callable[[], object]] = []

        def flex_once() -> object:
            if not lazily:
                lazily.append(flex(run, query, kv, mask, scale))
            return lazily[0]()

        methods["flex, compiled"] = flex_once
    read = 2 * kv.keys.numel() * kv.keys.element_size()
    work = 4 * nodes * heads * size * (context + nodes)
    what = f"{nodes} nodes, context {context}, {heads}/{heads // group} heads of {size}"
    us = run.time("attention", what, methods).get("ours", math.nan)
    run.add("attention", f"{what}: ours", gb_per_s=round(read / us / 1e3, 1), tflop_per_s=round(work / us / 1e6, 2))


def steps(run: Run) -> None:
    """Picking, walking, rejecting and committing against their torch twins."""
    nodes, vocab = run.pick((64, 128256), (6, 300))
    logits = run.randn(nodes, vocab) * 3
    ids = torch.arange(nodes, device=run.device)
    seed = torch.tensor([3], device=run.device)
    noise, one = NoiseKeys(seed, ids, ids), NoiseKeys(seed, ids[:1], ids[:1])
    for name, filters in {"greedy": Filters(), "T=1": Filters(1.0), "top-p": Filters(1.0, top_p=0.9)}.items():
        methods: Timed = {
            "ours": run.graphed(lambda f=filters: pick_rows(logits, f, noise)),
            "torch": lambda f=filters: pick_rows_torch(logits, f, noise),
        }
        run.time("steps", f"pick {nodes} x {vocab}, {name}", methods)
    tokens = torch.randint(0, vocab, (1, nodes), device=run.device)
    parents = ((ids.int() - 1) // 2)[None].clone()
    parents[0, 0] = -1
    picked = pick_rows(logits, Filters(1.0), noise)
    picks = picked.tokens.view(1, nodes)
    run.time(
        "steps",
        f"walk {nodes} nodes",
        {
            "ours": run.graphed(lambda: walk_tree(tokens, parents, picks)),
            "torch": lambda: walk_tree_torch(tokens, parents, picks, nodes),
        },
    )
    tree, batch = DraftTree(tokens, parents), logits.view(1, nodes, vocab)
    run.time(
        "steps",
        f"reject {nodes} nodes",
        {
            "ours": run.graphed(lambda: reject_tree(batch, picked, tree, one, 1.0)),
            "torch": lambda: reject_tree_torch(batch, picked, tree, one, 1.0, None, nodes),
        },
    )
    layers, heads, slots = run.pick((32, 8, 4096), (2, 2, 64))
    buffers = KVBuffers.of([run.randn(1, heads, slots, 128) for _ in range(2 * layers)])
    path = torch.tensor([[0, 2, 5, 7, 11]], dtype=torch.int32, device=run.device)
    start, count = (torch.tensor([n], dtype=torch.int32, device=run.device) for n in (slots // 2, 5))
    args = (buffers, start, path, count, torch.zeros_like(start)[:, None])
    methods = {"ours": run.graphed(lambda: commit_kv(*args)), "torch": lambda: commit_kv_torch(*args)}
    run.time("steps", f"commit 5 nodes, {layers} layers", methods)


def llama_shaped(run: Run) -> Any:
    """Random weights in the shape of Llama-3.1-8B (toy: two tiny layers)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = run.pick((128256, 4096, 14336, 32, 32, 8), (300, 128, 96, 2, 2, 1))
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    config = LlamaConfig(**dict(zip(names, sizes, strict=True)), max_position_embeddings=65536)
    with torch.device(run.device):
        return LlamaForCausalLM(config).to(run.dtype).eval()


def verify_pass(model: Any, nodes: int, context: int) -> Callable[[], object]:
    target = CausalLM(model)
    row = Row(0, [7] * context, context + 999)
    target.open([row])
    tree = TokenTree((7, *range(8, 7 + nodes)), (-1, *((i - 1) // 2 for i in range(1, nodes))))
    target.score([row], [tree])
    return lambda: target.score([row], [tree])


def model_steps(run: Run) -> None:
    """A whole verify pass of an 8B-shaped model, with transformers' attention and with ours, against reading the weights.

    The two attentions share one model, so they are timed one after the other.
    """
    model = llama_shaped(run)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rate = next((row["gb_per_s"] for row in run.rows if row["what"] == "copy rate"), None)
    floor = {} if rate is None else {"weights_alone_us": round(weights / rate / 1e3, 1)}
    for context in run.pick((1024, 8192, 32768), (20,)):
        for nodes in run.pick((1, 16, 64), (5,)):
            for name in ("transformers", "ours"):
                if name == "ours":
                    use_kernels(model)
                else:
                    model.set_attn_implementation("sdpa")
                run.time(
                    "model", f"{nodes} nodes, context {context}", {name: verify_pass(model, nodes, context)}, **floor
                )


def inflated(model: Any, num_layers: int) -> Any:
    """``model`` with layers behind its own whose outputs are zero: the same function at the cost of a deeper model."""
    deeper = copy.deepcopy(model)
    layers = deeper.get_decoder().layers
    for i in range(len(layers), num_layers):
        layer = copy.deepcopy(layers[i % model.config.num_hidden_layers])
        layer.self_attn.layer_idx = i
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
        layers.append(layer)
    deeper.config.num_hidden_layers = num_layers
    if getattr(deeper.config, "layer_types", None):
        deeper.config.layer_types = [deeper.config.layer_types[0]] * num_layers
    return deeper


def end_to_end(run: Run) -> None:
    """Text from the default model, as it is and with ten times its layers, against generate()."""
    import specdec
    from specdec.models import load_model, load_tokenizer

    if run.is_dry:
        model, ids = llama_shaped(run), torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    else:
        model = load_model(DEFAULT_MODEL, dtype=run.dtype, device=run.device)
        text = "Write a Python function that reverses a list, then explain it line by line.\n"
        ids = load_tokenizer(DEFAULT_MODEL)(text, return_tensors="pt").input_ids.to(run.device)
    real = model.config.num_hidden_layers
    num_new = run.pick(256, 8)
    for name, target in {"as it is": model, "ten times as deep": inflated(model, 10 * real)}.items():
        options: dict[str, Any] = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
        plain = target.generate(ids, **options)
        found = specdec.generate(target, ids, drafter="ngram", **options)
        tokens = getattr(found, "sequences", found)
        methods: Timed = {
            "generate()": lambda m=target, o=options: m.generate(ids, **o),
            "specdec, ngram": lambda m=target, o=options: specdec.generate(m, ids, drafter="ngram", **o),
        }
        run.time("end_to_end", f"{num_new} tokens, {name}", methods, match=bool(torch.equal(plain, tokens)))


SECTIONS: dict[str, Callable[[Run], None]] = {
    "ceilings": ceilings,
    "tests": tests,
    "attention": attentions,
    "steps": steps,
    "model": model_steps,
    "end_to_end": end_to_end,
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        numbers = "  ".join(f"{key} {value}" for key, value in row.items() if key not in ("section", "what"))
        lines.append(f"{row['section']:<11} {row['what']:<62} {numbers}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; none: all")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run tries every section on a CPU")
    if given.dry_run and not simulator.unavailable():
        os.environ.setdefault("SPECDEC_KERNELS", "sim")
    torch.manual_seed(0)
    run = Run("cpu" if given.dry_run else "cuda", given.dry_run, 1 if given.dry_run else given.rounds)
    settings = {"sections": given.sections, "rounds": run.rounds, "dry_run": run.is_dry}
    dtype = str(run.dtype).removeprefix("torch.")
    for name in given.sections or SECTIONS:
        with torch.inference_mode():
            SECTIONS[name](run)
        provenance = collect(sys.argv, dtype=dtype, device=run.device, models={}, settings=settings)
        write_json(given.output, {"schema": 1, "provenance": provenance, "rows": run.rows})
    print(table(run.rows))


if __name__ == "__main__":
    main()
