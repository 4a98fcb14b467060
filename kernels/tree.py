"""``top_children`` and ``build_tree``: grow a draft tree on the device, level by level, then keep its best nodes.

Letters: B rows, R frontier nodes of all rows, V vocabulary, k children, C candidates, n nodes, W words of bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.dispatch import choose
from specdec.kernels.launch import C_TYPES, int32, require
from specdec.kernels.walk import MAX_NODES

FILE = "tree.cu"
BUILD_EXPRESSIONS = ("build_tree",)
MAX_CHILDREN, MAX_CANDIDATES = 64, 1024


@dataclass(frozen=True, slots=True)
class BuiltTree:
    """Trees of n nodes; places behind ``counts`` are padding: the root's token, parent -1, seeing only themselves."""

    tokens: Tensor  # (B, n) int64
    parents: Tensor  # (B, n) int32
    depths: Tensor  # (B, n) int32
    positions: Tensor  # (B, n) int64
    chosen: Tensor  # (B, n) int32 the candidate of each node, -1: the root or padding
    bits: Tensor  # (B, n, W) int64: bit j % 64 of word j // 64 of row i says that node j is i or above it
    counts: Tensor  # (B,) int32 real nodes


def child_expressions(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernel of one dtype of logits."""
    return (f"top_children<{C_TYPES[dtype]}>",)


def top_children(logits: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable tokens (R, k) int64 after each node, and their summed log probabilities (R, k) float32.

    Of equal logits the lower token id comes first.

    Args:
        logits: (R, V), float32, float16 or bfloat16.
        scores: (R,) float32, the log probability of each node itself.

    Raises:
        ValueError: shapes or dtypes that do not fit, or k outside [1, 64] or above V.
    """
    require("logits", logits, tuple(C_TYPES), (None, None), logits)
    require("scores", scores, torch.float32, (len(logits),), logits)
    vocab = logits.shape[1]
    if not 1 <= k <= min(MAX_CHILDREN, vocab):
        raise ValueError(f"k must be in [1, {min(MAX_CHILDREN, vocab)}], got {k}")
    backend = choose("top_children", logits.device)
    if backend is None:
        return top_children_torch(logits, scores, k)
    (kernel,) = backend.load(FILE, child_expressions(logits.dtype))
    tokens = backend.empty((len(logits), k), torch.int64, logits.device)
    child_scores = backend.empty((len(logits), k), torch.float32, logits.device)
    kernel((len(logits),), 512, (logits, scores, tokens, child_scores, int32(vocab), int32(k)))
    return tokens, child_scores


def top_children_torch(logits: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The twin of :func:`top_children`."""
    values, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    logs = values[:, :k] - logits.double().logsumexp(-1, keepdim=True)
    return tokens[:, :k].contiguous(), (scores[:, None] + logs).float()


def build_tree(
    scores: Tensor, parents: Tensor, tokens: Tensor, roots: Tensor, root_positions: Tensor, num_nodes: int
) -> BuiltTree:
    """The best ``num_nodes`` - 1 candidates of each row below its root, as a tree in topological order.

    Candidates stand level by level. None may outrank its parent (summed log probabilities never do); of equal scores
    the earlier candidate is better. A score of -inf is no candidate.

    Args:
        scores: (B, C) float32.
        parents: (B, C) int32, an earlier candidate, or -1 for the root.
        tokens: (B, C) int64.
        roots: (B,) int64, the root's token.
        root_positions: (B,) int64.
        num_nodes: n, with the root.

    Raises:
        ValueError: shapes or dtypes that do not fit, more than 1024 candidates, or n outside [1, 256].
    """
    require("scores", scores, torch.float32, (None, None), scores)
    rows, candidates = scores.shape
    require("parents", parents, torch.int32, (rows, candidates), scores)
    require("tokens", tokens, torch.int64, (rows, candidates), scores)
    require("roots", roots, torch.int64, (rows,), scores)
    require("root_positions", root_positions, torch.int64, (rows,), scores)
    if not 1 <= num_nodes <= MAX_NODES or not 1 <= candidates <= MAX_CANDIDATES:
        raise ValueError(
            f"num_nodes must be in [1, {MAX_NODES}] and candidates in [1, {MAX_CANDIDATES}], got {num_nodes} and {candidates}"
        )
    backend = choose("build_tree", scores.device)
    if backend is None:
        return build_tree_torch(scores, parents, tokens, roots, root_positions, num_nodes)
    (kernel,) = backend.load(FILE, BUILD_EXPRESSIONS)
    words = (num_nodes + 63) // 64

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return backend.empty((rows, *shape), dtype, scores.device)

    built = BuiltTree(
        tokens=empty(torch.int64, num_nodes),
        parents=empty(torch.int32, num_nodes),
        depths=empty(torch.int32, num_nodes),
        positions=empty(torch.int64, num_nodes),
        chosen=empty(torch.int32, num_nodes),
        bits=empty(torch.int64, num_nodes, words),
        counts=empty(torch.int32),
    )
    outputs = (built.tokens, built.parents, built.depths, built.positions, built.chosen, built.bits, built.counts)
    sizes = (int32(candidates), int32(num_nodes), int32(words))
    threads = -(-max(candidates, num_nodes) // 32) * 32
    kernel((rows,), threads, (scores, parents, tokens, roots, root_positions, *outputs, *sizes))
    return built


def build_tree_torch(
    scores: Tensor, parents: Tensor, tokens: Tensor, roots: Tensor, root_positions: Tensor, num_nodes: int
) -> BuiltTree:
    """The twin of :func:`build_tree`, on the host."""
    rows, words = len(scores), (num_nodes + 63) // 64
    built = BuiltTree(
        roots[:, None].repeat(1, num_nodes),
        torch.full((rows, num_nodes), -1, dtype=torch.int32),
        torch.zeros(rows, num_nodes, dtype=torch.int32),
        root_positions[:, None].repeat(1, num_nodes),
        torch.full((rows, num_nodes), -1, dtype=torch.int32),
        torch.zeros(rows, num_nodes, words, dtype=torch.int64),
        torch.ones(rows, dtype=torch.int32),
    )
    for b in range(rows):
        values = scores[b].tolist()
        ranked = sorted(range(len(values)), key=lambda c: (-values[c], c))
        kept = sorted(c for c in ranked[: num_nodes - 1] if values[c] > -math.inf)
        place = {c: node for node, c in enumerate(kept, 1)} | {-1: 0}
        seen = [1 << node for node in range(num_nodes)]
        for node, c in enumerate(kept, 1):
            parent = place[int(parents[b, c])]
            built.tokens[b, node], built.parents[b, node], built.chosen[b, node] = int(tokens[b, c]), parent, c
            built.depths[b, node] = built.depths[b, parent] + 1
            seen[node] |= seen[parent]
        built.positions[b] += built.depths[b].to(built.positions)
        built.bits[b] = torch.tensor([pack_bits(value, words) for value in seen])
        built.counts[b] = 1 + len(kept)
    return BuiltTree(*(getattr(built, name).to(scores.device) for name in BuiltTree.__slots__))


def pack_bits(value: int, words: int) -> list[int]:
    """The signed 64-bit words of a bit set, lowest first."""
    split = (value >> 64 * word & 2**64 - 1 for word in range(words))
    return [word - 2**64 if word >> 63 else word for word in split]
