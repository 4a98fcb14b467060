"""Picking, walking, rejecting and committing against their torch twins."""

from __future__ import annotations

import torch

from gpu_sections.timing import Run, Timed
from specdec.kernels.commit import KVBuffers, commit_kv, commit_kv_torch
from specdec.kernels.pick import Filters, pick_rows, pick_rows_torch
from specdec.kernels.reject import DraftTree, reject_tree, reject_tree_torch
from specdec.kernels.rng import RngKeys
from specdec.kernels.walk import walk_tree, walk_tree_torch


def steps(run: Run) -> None:
    """Picking, walking, rejecting and committing against their torch twins."""
    nodes, vocab = run.pick((64, 128256), (6, 300))
    logits = run.randn(nodes, vocab) * 3
    ids = torch.arange(nodes, device=run.device)
    seed = torch.tensor([3], device=run.device)
    rng, one = RngKeys(seed, ids, ids), RngKeys(seed, ids[:1], ids[:1])
    for name, filters in {"greedy": Filters(), "T=1": Filters(1.0), "top-p": Filters(1.0, top_p=0.9)}.items():
        methods: Timed = {
            "ours": run.graphed(lambda f=filters: pick_rows(logits, f, rng)),
            "torch": lambda f=filters: pick_rows_torch(logits, f, rng),
        }
        run.time("steps", f"pick {nodes} x {vocab}, {name}", methods)
    tokens = torch.randint(0, vocab, (1, nodes), device=run.device)
    parents = ((ids.int() - 1) // 2)[None].clone()
    parents[0, 0] = -1
    picked = pick_rows(logits, Filters(1.0), rng)
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
