"""``walk_tree``: sample-and-match from the root down, on the device. Letters: B rows, n nodes, P longest path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.dispatch import choose
from specdec.kernels.launch import int32, require

FILE = "walk.cu"
EXPRESSIONS = ("walk_tree",)
MAX_NODES = 256


@dataclass(frozen=True, slots=True)
class Walked:
    """A verdict for each row; places behind ``counts`` hold -1."""

    path: Tensor  # (B, P) int32 accepted nodes, the root first
    tokens: Tensor  # (B, P) int64 emitted tokens: those of the accepted nodes below the root, then one more
    counts: Tensor  # (B,) int32 emitted tokens, which is also the number of nodes in the path


def walk_tree(tokens: Tensor, parents: Tensor, picked: Tensor, max_path: int | None = None) -> Walked:
    """At each node emit its picked token; where a child holds that token go there, else stop.

    Greedy decoding with the argmax of each node, sample-and-match with draws whose noise is tied to the position.
    Siblings are tried in order. Nodes of parent -1 other than the root are padding.

    Args:
        tokens: (B, n) int64, node 0 is the root.
        parents: (B, n) int32, -1 for the root, else an earlier node.
        picked: (B, n) int64, the target's token after each node (``pick_rows``).
        max_path: P, at most this many nodes are followed; n if None.

    Raises:
        ValueError: shapes or dtypes that do not fit, or more than 256 nodes.
    """
    check_tree(tokens, parents)
    require("picked", picked, torch.int64, tuple(tokens.shape), tokens)
    limit = tokens.shape[1] if max_path is None else max_path
    if limit < 1:
        raise ValueError(f"max_path must be at least 1, got {max_path}")
    backend = choose("walk_tree", tokens.device)
    if backend is None:
        return walk_tree_torch(tokens, parents, picked, limit)
    (kernel,) = backend.load(FILE, EXPRESSIONS)
    rows, nodes = tokens.shape
    path = backend.empty((rows, limit), torch.int32, tokens.device)
    emitted = backend.empty((rows, limit), torch.int64, tokens.device)
    counts = backend.empty((rows,), torch.int32, tokens.device)
    kernel((rows,), 32, (tokens, parents, picked, path, emitted, counts, int32(nodes), int32(limit)))
    return Walked(path, emitted, counts)


def check_tree(tokens: Tensor, parents: Tensor) -> None:
    """Raises ValueError unless both are (B, n) of their dtypes with at most 256 nodes."""
    require("tokens", tokens, torch.int64, (None, None), tokens)
    require("parents", parents, torch.int32, tuple(tokens.shape), tokens)
    if not 0 < tokens.shape[1] <= MAX_NODES or tokens.shape[0] == 0:
        raise ValueError(f"trees need 1 or more rows and 1 to {MAX_NODES} nodes, got shape {tuple(tokens.shape)}")


def walk_tree_torch(tokens: Tensor, parents: Tensor, picked: Tensor, max_path: int) -> Walked:
    """The twin of :func:`walk_tree`: one level a turn for all rows, without host reads."""
    node = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
    is_on = torch.ones_like(node, dtype=torch.bool)
    path, emitted = [], []
    for _ in range(max_path):
        pick = picked.gather(1, node)
        path.append(torch.where(is_on, node, -1))
        emitted.append(torch.where(is_on, pick, -1))
        matches = (parents == node) & (tokens == pick)
        is_on = is_on & matches.any(1, keepdim=True)
        node = matches.int().argmax(1, keepdim=True)
    nodes = torch.cat(path, 1).int()
    return Walked(nodes, torch.cat(emitted, 1), (nodes >= 0).sum(1).int())
