"""One small, telling workload for each kernel: mutants must fail it, sanitizers must find nothing in it.

``python kernel_probes.py NAME...`` runs some of them, for the sanitizers, which need a process of their own; ``support``
must be on its path.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from kernel_cases import SCHEDULES, ancestors, noise_keys, random_parents
from simulator import schedule
from torch import Tensor

from specdec.kernels.attention import KVView, TreeMask, pack_mask, tree_attention, tree_attention_torch
from specdec.kernels.commit import KVBuffers, commit_kv, commit_kv_torch
from specdec.kernels.pick import Filters, PickedRows, pick_rows, pick_rows_torch
from specdec.kernels.reject import Drafts, DraftTree, reject_tree, reject_tree_torch
from specdec.kernels.rng import COIN, RngKeys, philox
from specdec.kernels.walk import walk_tree, walk_tree_torch

PROBES: dict[str, Callable[[], None]] = {}


def probe(function: Callable[[], None]) -> Callable[[], None]:
    PROBES[function.__name__] = function
    return function


def equal(got: object, expected: object) -> None:
    for name in type(expected).__slots__:  # type: ignore[attr-defined]
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b), name


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention_inputs(dtype: torch.dtype, heads: int, nodes: int) -> tuple[Tensor, KVView, TreeMask]:
    """Two rows of different lengths in pages of 16; nodes of both bit words."""
    query = torch.randn(2, nodes, heads, 64, generator=generator(1)).to(dtype)
    keys, values = (torch.randn(70, 1, 16, 64, generator=generator(s)).to(dtype) for s in (2, 3))
    pages = torch.randperm(70, generator=generator(4))[:60].view(2, 30).int()
    seen = torch.stack([ancestors(random_parents(nodes, row)) for row in range(2)])
    depths = (seen.sum(2) - 1).int()
    lengths = torch.tensor([318, 45], dtype=torch.int32)
    # What is behind the area is garbage, and so are the bits for it.
    bits = pack_mask(seen)
    bits[:, :, 1] |= -1 << (nodes - 64)
    for row, length in enumerate(lengths.tolist()):
        for slot in range(length + nodes, 480):
            keys[pages[row, slot // 16], :, slot % 16] = math.nan
            values[pages[row, slot // 16], :, slot % 16] = math.nan
    return query, KVView(keys, values, pages), TreeMask(lengths, bits, nodes, depths, depths)


def attention(dtype: torch.dtype, heads: int, tolerance: float) -> None:
    query, kv, mask = attention_inputs(dtype, heads, 70)
    for window, sinks in ((0, torch.tensor([1.0, 30.0][:heads])), (5, None)):
        got = tree_attention(query, kv, mask, 0.3, window, 0.0, sinks)
        expected = tree_attention_torch(query.double(), kv, mask, 0.3, window, 0.0, sinks)
        assert float((got.double() - expected).norm() / expected.norm()) < tolerance


@probe
def attention_mma() -> None:
    attention(torch.float16, 2, 2e-3)


@probe
def attention_f32() -> None:
    attention(torch.float32, 1, 1e-5)


@probe
def pick() -> None:
    logits = (torch.randn(3, 5003, generator=generator(1)) * 3).bfloat16().float()
    logits[2, 1000:1400] = logits[2].max()  # ties across threads and at the border of top-p
    flat = torch.randn(8, 5003, generator=generator(2)) * 0.3  # where rng decides
    assert pick_rows(flat, Filters(1.0), noise_keys(8)).tokens.tolist() == (
        pick_rows_torch(flat, Filters(1.0), noise_keys(8)).tokens.tolist()
    )
    picks_as_its_twin(flat[:2], Filters(1.0, top_k=20))  # no ties: exactly so many are kept
    for filters in (Filters(), Filters(1.2), Filters(0.8, 30, 0.7), Filters(1.0, top_p=0.5), Filters(1.0, min_p=0.1)):
        picks_as_its_twin(logits, filters)


def picks_as_its_twin(logits: Tensor, filters: Filters) -> None:
    rng = noise_keys(len(logits))
    got, expected = pick_rows(logits, filters, rng), pick_rows_torch(logits, filters, rng)
    assert got.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(got.lse, expected.lse, rtol=0, atol=1e-5)
    assert got.lasts is None or expected.lasts is None or got.lasts.tolist() == expected.lasts.tolist()


@probe
def walk() -> None:
    nodes = 200
    tokens = torch.tensor([[i % 7 for i in range(nodes)]] * 2)
    parents = torch.tensor([random_parents(nodes, seed, 9) for seed in range(2)], dtype=torch.int32)
    picked = torch.zeros_like(tokens)
    for row in range(2):
        for i in range(1, nodes):
            picked[row, parents[row, i]] = tokens[row, i]
    equal(walk_tree(tokens, parents, picked), walk_tree_torch(tokens, parents, picked, nodes))


def rejection_inputs() -> tuple[Tensor, DraftTree, RngKeys]:
    rows, nodes, vocab = 12, 13, 700
    parents = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4]] * rows, dtype=torch.int32)
    tokens = torch.tensor([[9, 1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 9]] * rows)
    logits = torch.randn(rows, nodes, vocab, generator=generator(1))
    logits[:, :, :10] += 5.5
    probs = (logits + torch.randn(logits.shape, generator=generator(2)) * 0.5).softmax(-1)
    sources = torch.where(torch.arange(nodes) % 4 == 1, -1, parents).int()
    without = (torch.arange(nodes) % 2 == 0).int().repeat(rows, 1)
    return logits, DraftTree(tokens, parents, Drafts(sources, probs, without)), noise_keys(rows)


@probe
def reject() -> None:
    logits, tree, rng = rejection_inputs()
    nodes, vocab = logits.shape[1:]
    keys = RngKeys(rng.seed, rng.rows.repeat_interleave(nodes), rng.positions.repeat_interleave(nodes))
    for filters in (Filters(1.0), Filters(1.5, top_p=0.95)):
        picked = pick_rows_torch(logits.view(-1, vocab), filters, keys)
        got = reject_tree(logits, picked, tree, rng, filters.temperature)
        equal(got, reject_tree_torch(logits, picked, tree, rng, filters.temperature, None, nodes))


@probe
def reject_on_equality() -> None:
    """A bernoulli that equals p / q exactly rejects; the ratio is made of p = 1 and a q above 1, which no draft has."""
    rows, seed = torch.arange(100_000), torch.tensor([5])
    exact = (philox((0, 0, COIN << 28, rows), seed)[0].numpy() + 0.5) * 2.0**-32
    uniforms = exact.astype(np.float32)
    inverses = np.float32(1) / uniforms
    row = int(np.flatnonzero((uniforms == exact) & (np.float32(1) / inverses == uniforms))[0])
    rng, inverse = RngKeys(seed, torch.tensor([row]), torch.tensor([0])), inverses[row]
    probs = torch.full((1, 1, 5), float(inverse))
    drafts = Drafts(torch.tensor([[-1, 0]]).int(), probs, torch.zeros(1, 1, dtype=torch.int32))
    tree = DraftTree(torch.tensor([[0, 1]]), torch.tensor([[-1, 0]], dtype=torch.int32), drafts)
    picked = PickedRows(torch.tensor([2, 2]), torch.zeros(2), torch.zeros(2))  # lse 0: each token has p = 1
    assert reject_tree(torch.zeros(1, 2, 5), picked, tree, rng, 1.0).counts.item() == 1


@probe
def commit() -> None:
    nodes = [0, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 20]
    path = torch.tensor([nodes, [*nodes[:10], -1, -1]], dtype=torch.int32)
    counts, starts = torch.tensor([12, 10], dtype=torch.int32), torch.tensor([5, 0], dtype=torch.int32)
    pages = torch.tensor([[3, 1, 0, 7], [2, 4, 5, 6]], dtype=torch.int32)
    tensors = [torch.randn(8, 2, 8, 64, generator=generator(s)).half() for s in range(4)]
    copies = [tensor.clone() for tensor in tensors]
    commit_kv(KVBuffers.of(tensors), starts, path, counts, pages)
    commit_kv_torch(KVBuffers.of(copies), starts, path, counts, pages)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def run(name: str, seeds: Sequence[int] = SCHEDULES) -> None:
    """One probe under some schedules."""
    for seed in seeds:
        with schedule(seed):
            PROBES[name]()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:]:
        run(each, SCHEDULES[:1])  # a sample_without_replacement is found in any order, and a bad address too
        print("ran", each, flush=True)
