"""``reject_tree``: multi-round rejection sampling along a tree, on the device (rules 2 to 6 of docs/verification.md).

Letters: B rows, n nodes, m rows of draft probabilities, V vocabulary, P longest path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.dispatch import choose
from specdec.kernels.launch import C_TYPES, Backend, float32, int32, require
from specdec.kernels.pick import Grammar, PickedRows, allowed_logits, check_noise, is_kept
from specdec.kernels.rng import COIN, RESIDUAL, RngKeys, step_words
from specdec.kernels.walk import Walked, check_tree

FILE = "reject.cu"


@dataclass(frozen=True, slots=True)
class Drafts:
    """What drawn nodes were drawn from."""

    sources: Tensor  # (B, n) int32 the row of ``probs`` for each node, -1: picked with certainty
    probs: Tensor  # (B, m, V) float32
    without_replacement: Tensor  # (B, m) int32: 1 where siblings were drawn one after another, 0: independently


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Trees of the same size; nodes of parent -1 other than the root are padding."""

    tokens: Tensor  # (B, n) int64, node 0 is the root
    parents: Tensor  # (B, n) int32
    drafts: Drafts | None = None  # None: all nodes were picked with certainty


def expressions(dtype: torch.dtype) -> tuple[str, ...]:
    """The kernel of one dtype of logits."""
    return (f"reject_tree<{C_TYPES[dtype]}>",)


def reject_tree(
    logits: Tensor,
    picked: PickedRows,
    tree: DraftTree,
    rng: RngKeys,
    temperature: float,
    grammar: Grammar | None = None,
    max_path: int | None = None,
) -> Walked:
    """Accept a child x with probability p(x) / q(x), else go on with norm((p - q)+); the coin is compared with ``<``.

    Where nothing was tried the row's token is the target's own pick, ``picked.tokens``; after rejections it is drawn
    from what is left. No host reads; no residual is stored.

    Args:
        logits: (B, n, V), float32, float16 or bfloat16.
        picked: ``pick_rows`` of the same logits as (B n, V) with the same temperature, filters and grammar.
        noise: keys (B,) whose positions are those of the first undecided token, the one after the root.
        max_path: P, at most this many nodes are followed; n if None.

    Raises:
        ValueError: shapes or dtypes that do not fit, or temperature 0 (use ``walk_tree``).
    """
    _check(logits, picked, tree, rng, temperature, grammar)
    limit = logits.shape[1] if max_path is None else max_path
    if limit < 1:
        raise ValueError(f"max_path must be at least 1, got {max_path}")
    backend = choose("reject_tree", logits.device)
    if backend is None:
        return reject_tree_torch(logits, picked, tree, rng, temperature, grammar, limit)
    return _launch(backend, logits, picked, tree, rng, temperature, grammar, limit)


def _check(
    logits: Tensor,
    picked: PickedRows,
    tree: DraftTree,
    rng: RngKeys,
    temperature: float,
    grammar: Grammar | None,
) -> None:
    if not temperature > 0:
        raise ValueError(
            f"rejection needs a temperature above 0 (use walk_tree for greedy decoding), got {temperature}"
        )
    require("logits", logits, tuple(C_TYPES), (*tree.tokens.shape, None), logits)
    check_tree(tree.tokens, tree.parents)
    rows, nodes, vocab = logits.shape
    require("picked.tokens", picked.tokens, torch.int64, (rows * nodes,), logits)
    require("picked.lse", picked.lse, torch.float32, (rows * nodes,), logits)
    check_noise(rng, rows, logits)
    if tree.drafts is not None:
        require("sources", tree.drafts.sources, torch.int32, (rows, nodes), logits)
        require("draft probs", tree.drafts.probs, torch.float32, (rows, None, vocab), logits)
        require("without_replacement", tree.drafts.without_replacement, torch.int32, (rows, None), logits)
        if tree.drafts.probs.shape[1] != tree.drafts.without_replacement.shape[1]:
            raise ValueError("draft probs and without_replacement must have the same number of rows m")
    if grammar is not None:
        require("grammar.bits", grammar.bits, torch.int32, (None, (vocab + 31) // 32), logits)
        require("grammar.rows", grammar.rows, torch.int32, (rows * nodes,), logits)


def _launch(
    backend: Backend,
    logits: Tensor,
    picked: PickedRows,
    tree: DraftTree,
    rng: RngKeys,
    temperature: float,
    grammar: Grammar | None,
    limit: int,
) -> Walked:
    (kernel,) = backend.load(FILE, expressions(logits.dtype))
    rows, nodes, vocab = logits.shape
    path = backend.empty((rows, limit), torch.int32, logits.device)
    emitted = backend.empty((rows, limit), torch.int64, logits.device)
    counts = backend.empty((rows,), torch.int32, logits.device)
    bits = (grammar.bits, grammar.rows) if grammar else (None, None)
    drafts = tree.drafts
    drawn = (drafts.sources, drafts.probs, drafts.without_replacement) if drafts else (None, None, None)
    num_drafts = drafts.probs.shape[1] if drafts else 0
    args = (
        *(logits, *bits, picked.lse, picked.bounds, picked.lasts, picked.tokens, tree.tokens, tree.parents, *drawn),
        *(rng.seed, rng.rows, rng.positions, path, emitted, counts),
        *(int32(nodes), int32(num_drafts), int32(vocab), int32(limit), float32(1 / temperature)),
    )
    kernel((rows,), _threads(vocab), args)
    return Walked(path, emitted, counts)


def _threads(vocab: int) -> int:
    """Eight tokens a thread, at least two warps: a function of nothing but the vocabulary, as sums are in its order."""
    return min(512, max(64, -(-vocab // 256) * 32))


def reject_tree_torch(
    logits: Tensor,
    picked: PickedRows,
    tree: DraftTree,
    rng: RngKeys,
    temperature: float,
    grammar: Grammar | None,
    max_path: int,
) -> Walked:
    """The twin of :func:`reject_tree`: whole residuals in float64, on the host."""
    rows, nodes, vocab = logits.shape
    raw = allowed_logits(logits.reshape(-1, vocab), grammar)
    probs = (raw / temperature).masked_fill(~is_kept(raw, picked.bounds, picked.lasts), -torch.inf).softmax(-1)
    path = torch.full((rows, max_path), -1, dtype=torch.int32)
    emitted = torch.full((rows, max_path), -1, dtype=torch.int64)
    counts = torch.zeros(rows, dtype=torch.int32)
    for b in range(rows):
        walk = _RowWalk(probs.view(rows, nodes, vocab)[b], picked.tokens.view(rows, nodes)[b], tree, rng, b)
        visited, tokens = walk.run(max_path)
        path[b, : len(visited)] = torch.tensor(visited)
        emitted[b, : len(tokens)] = torch.tensor(tokens)
        counts[b] = len(tokens)
    return Walked(*(t.to(logits.device) for t in (path, emitted, counts)))


@dataclass(frozen=True, slots=True)
class _RowWalk:
    """One row of the twin."""

    probs: Tensor  # (n, V)
    picked: Tensor  # (n,)
    tree: DraftTree
    rng: RngKeys
    row: int

    def run(self, max_path: int) -> tuple[list[int], list[int]]:
        tokens, parents = self.tree.tokens[self.row].tolist(), self.tree.parents[self.row].tolist()
        visited, emitted = [0], list[int]()
        while True:
            node, depth = visited[-1], len(emitted)
            children = [c for c in range(1, len(tokens)) if parents[c] == node] if depth + 1 < max_path else []
            accepted, left = self._try(children, tokens, self.probs[node].clone(), depth)
            if accepted is None:
                emitted.append(self._draw(left, depth) if children else int(self.picked[node]))
                return visited, emitted
            visited.append(accepted)
            emitted.append(tokens[accepted])

    def _try(self, children: list[int], tokens: list[int], left: Tensor, depth: int) -> tuple[int | None, Tensor]:
        drafts: dict[int, Tensor] = {}
        for order, child in enumerate(children):
            token, source = tokens[child], self._source(child)
            draft = drafts[source] if source in drafts else self._draft(source, token, len(left))
            coin = (step_words(self.rng, self.row, COIN, depth, order)[0] + 0.5) * 2.0**-32
            if coin < float(left[token] / draft[token]):
                return child, left
            rest = (left - draft).clamp(min=0)
            left = rest / rest.sum() if rest.sum() > 0 else left
            if source >= 0 and self.tree.drafts and self.tree.drafts.without_replacement[self.row, source]:
                drafts[source] = draft.index_fill(0, torch.tensor([token], device=draft.device), 0.0)
                drafts[source] /= drafts[source].sum()
        return None, left

    def _source(self, child: int) -> int:
        return int(self.tree.drafts.sources[self.row, child]) if self.tree.drafts else -1

    def _draft(self, source: int, token: int, vocab: int) -> Tensor:
        if source >= 0 and self.tree.drafts:
            return self.tree.drafts.probs[self.row, source].double()
        return torch.zeros(vocab, dtype=torch.float64, device=self.probs.device).index_fill(
            0, torch.tensor([token], device=self.probs.device), 1.0
        )

    def _draw(self, left: Tensor, depth: int) -> int:
        words = step_words(self.rng, self.row, RESIDUAL, depth, 0)
        uniform = (words[0] * 2.0**32 + words[1] + 0.5) * 2.0**-64
        reached = left.cumsum(-1)
        token = int(torch.searchsorted(reached, uniform * reached[-1], right=True))
        # Rounding may lead past the end, or onto the last token that has any mass.
        return token if token < len(left) and left[token] > 0 else int(left.nonzero()[-1])
