"""Verdicts for all rows of a pass at once, by the kernels: one small copy of what was decided comes to the host.

Taken where ``SPECDEC_KERNELS`` names a backend that runs on the device of the logits. What this does not cover is
decided row by row on the host. The kernels compute in float32 and the verifiers on the host partly in float64: greedy
tokens are the same, sampled ones unless two scores nearly tie (docs/verification.md). Letters: B rows, n nodes of the
largest tree, m rows of draft probabilities, V vocabulary, P nodes of the longest path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec.decode import RowByRow
from specdec.distributions import LogitsTransform, WarperTransform, non_finite_logits
from specdec.interfaces import BatchRule, Row, Scores, TargetDistributions, Verdict, Verifier
from specdec.kernels.dispatch import is_wanted
from specdec.kernels.launch import C_TYPES
from specdec.kernels.pick import MAX_VOCAB, Filters, PickedRows, pick_rows
from specdec.kernels.reject import Drafts, DraftTree, reject_tree
from specdec.kernels.rng import RngKeys
from specdec.kernels.walk import MAX_NODES, Walked, walk_tree, walk_tree_torch
from specdec.rng import PhiloxRng, Rng
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """The trees and logits of a pass, padded to one size, on the device of the logits."""

    trees: Sequence[TokenTree]  # B
    logits: Tensor  # (B, n, V)
    tokens: Tensor  # (B, n) int64
    parents: Tensor  # (B, n) int32, -1 for roots and padding
    sources: Tensor  # (B, n) int32, the row of draft probabilities of each node, -1: picked with certainty
    without_replacement: Tensor  # (B, m) int32
    filters: Filters
    step_rng: RngKeys  # (B,) whose positions are those of the first undecided tokens
    node_rng: RngKeys  # (B n,) whose positions are those of the tokens after each node
    max_path: int  # P

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        scores: Sequence[Scores],
        params: SamplingParams,
        seed: int,
    ) -> TreeBatch:
        """Bring the trees to the logits; nobody waits for it."""
        logits = _joined([each.logits for each in scores])
        num_nodes, num_draws = logits.shape[1], max(len(tree.draws) for tree in trees)
        depths = _padded([tree.depths() for tree in trees], num_nodes, 0)
        positions = np.array([len(row.tokens) for row in rows])
        keys = np.array([row.key for row in rows])
        kinds = [[draw is Draw.WITHOUT_REPLACEMENT for draw in tree.draws] for tree in trees]
        wide = (
            np.array([seed], dtype=np.uint64).view(np.int64),
            keys,
            positions,
            keys.repeat(num_nodes),
            (positions[:, None] + depths).reshape(-1),
            _padded([tree.tokens for tree in trees], num_nodes, 0),
        )
        narrow = (
            _padded([tree.parents for tree in trees], num_nodes, -1),
            _padded([tree.sources for tree in trees], num_nodes, -1),
            _padded(kinds, num_draws, 0),
        )
        moved = _moved([*wide, *(array.astype(np.int32) for array in narrow)], logits.device)
        one_seed, row_keys, row_positions, node_keys, node_positions, tokens, parents, sources, without = moved
        return cls(
            trees,
            logits,
            tokens,
            parents,
            sources,
            without,
            filters=Filters(params.temperature, params.top_k, params.top_p, params.min_p),
            step_rng=RngKeys(one_seed, row_keys, row_positions),
            node_rng=RngKeys(one_seed, node_keys, node_positions),
            max_path=1 + int(depths.max()),
        )

    def pick(self) -> PickedRows:
        """The target's token after every node, rows of padding too: (B n,)."""
        return pick_rows(self.logits.flatten(0, 1), self.filters, self.node_rng)

    def follow(self, picked: PickedRows) -> Walked:
        """Sample-and-match, and greedy decoding by any exact rule."""
        walk = walk_tree if self.tokens.shape[1] <= MAX_NODES else walk_tree_torch
        return walk(self.tokens, self.parents, picked.tokens.view(self.tokens.shape), self.max_path)

    def reject(self, picked: PickedRows) -> Walked:
        """Rejection sampling along the trees (rules 2 to 6 of docs/verification.md)."""
        tree = DraftTree(self.tokens, self.parents, self._drafts())
        rng, temperature = self.step_rng, self.filters.temperature
        return reject_tree(self.logits, picked, tree, rng, temperature, max_path=self.max_path)

    def _drafts(self) -> Drafts | None:
        if not self.without_replacement.shape[1]:
            return None
        nothing = self.logits.new_empty((0, self.logits.shape[2]), dtype=torch.float32)
        probs = [nothing if tree.draft_probs is None else tree.draft_probs.to(nothing) for tree in self.trees]
        return Drafts(self.sources, _joined(probs), self.without_replacement)


@dataclass(frozen=True, slots=True)
class BatchVerdicts:
    """Decides on the device of the logits where that is possible, else row by row on the host."""

    verifier: Verifier
    logits_transform: LogitsTransform
    rng: Rng

    def __call__(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        scores: Sequence[Scores],
        probs: Sequence[TargetDistributions],
    ) -> list[Verdict]:
        decided = verdicts_on_device(self.verifier, self.logits_transform, self.rng, rows, trees, scores)
        return RowByRow(self.verifier, self.rng)(rows, trees, scores, probs) if decided is None else decided


def verdicts_on_device(
    verifier: Verifier,
    logits_transform: LogitsTransform,
    rng: Rng,
    rows: Sequence[Row],
    trees: Sequence[TokenTree],
    scores: Sequence[Scores],
) -> list[Verdict] | None:
    """What ``verifier`` decides on each row, read in one copy; None: ask it row by row on the host.

    Raises:
        NonFiniteLogitsError: a node on the way of a row has logits with NaN or infinity, or none that is allowed.
    """
    rule = _rule(verifier, logits_transform, rng, trees, scores[0].logits)
    if rule is None:
        return None
    seed = rng.seed if isinstance(rng, PhiloxRng) else 0
    decided = decide(rule, TreeBatch.of(rows, trees, scores, logits_transform.params, seed))
    return [_verdict(row, tree, *lists) for row, tree, lists in zip(rows, trees, decided.tolist(), strict=True)]


def decide(rule: BatchRule, batch: TreeBatch) -> Tensor:
    """(B, 2, P) int64 nodes of the paths and emitted tokens, -1 behind their ends, without host reads.

    A token of -1 on a path says that nothing can be picked there.
    """
    picked = batch.pick()
    walked = batch.follow(picked) if rule is BatchRule.FOLLOW else batch.reject(picked)
    path = walked.path.long()
    # The log-sum-exp is not finite where a logit is NaN or +inf, or where all are -inf.
    can_pick = picked.lse.isfinite().view(batch.tokens.shape).gather(1, path.clamp(min=0))
    return torch.stack((path, walked.tokens.where(can_pick, -1)), 1)


def _rule(
    verifier: Verifier, logits_transform: LogitsTransform, rng: Rng, trees: Sequence[TokenTree], logits: Tensor
) -> BatchRule | None:
    """How ``verifier`` decides on these trees by kernels, if it can and they are wanted."""
    if not isinstance(logits_transform, WarperTransform):
        return None
    if logits.dtype not in C_TYPES or logits.shape[1] > MAX_VOCAB or not is_wanted("pick_rows", logits.device):
        return None
    if not logits_transform.params.is_greedy and not isinstance(rng, PhiloxRng):
        return None
    rule = verifier.batch_rule(logits_transform.params)
    if rule is None:
        return None
    if rule is not BatchRule.FOLLOW and max(map(len, trees)) > MAX_NODES:
        return None
    # What it is not exact for it refuses itself.
    is_exact = all(tree.drawn <= verifier.draws and (tree.is_chain or not verifier.chain_only) for tree in trees)
    return rule if is_exact else None


def _verdict(row: Row, tree: TokenTree, path: Sequence[int], tokens: Sequence[int]) -> Verdict:
    nodes = tuple(node for node in path if node >= 0)
    for node, token in zip(nodes, tokens, strict=False):
        if token < 0:
            raise non_finite_logits(row, tree, node)
    return Verdict(nodes, tuple(tokens[: len(nodes)]))


def _joined(row_passes: Sequence[Tensor]) -> Tensor:
    """(B, n, V) of tensors (at most n, V), zeros behind them; those that already lie side by side are not copied."""
    first = row_passes[0]
    step, storage = first.numel() * first.element_size(), first.untyped_storage().data_ptr()
    if all(
        row_pass.shape == first.shape
        and row_pass.is_contiguous()
        and row_pass.untyped_storage().data_ptr() == storage
        and row_pass.data_ptr() == first.data_ptr() + i * step
        for i, row_pass in enumerate(row_passes)
    ):
        return first.as_strided((len(row_passes), *first.shape), (first.numel(), *first.stride()))
    return pad_sequence(list(row_passes), batch_first=True)


def _padded(lists: Sequence[Sequence[int]], size: int, fill: int) -> NDArray[np.int64]:
    """(B, ``size``)"""
    out = np.full((len(lists), size), fill)
    for cache_row, values in zip(out, lists, strict=True):
        cache_row[: len(values)] = values
    return out


def _moved(arrays: Iterable[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """``arrays`` of 32 or 64 bits on ``device``, in one copy."""
    arrays = list(arrays)
    sizes = [-(-array.nbytes // 8) for array in arrays]
    words = torch.zeros(sum(sizes), dtype=torch.long, pin_memory=device.type == "cuda")
    for row_pass, array in zip(torch.split(words, sizes), arrays, strict=True):
        row_pass.numpy().view(array.dtype)[: array.size] = array.reshape(-1)
    row_passes = torch.split(words.to(device, non_blocking=True), sizes)
    types = {4: torch.int32, 8: torch.int64}
    return [
        row_pass.view(types[array.itemsize])[: array.size].view(array.shape)
        for row_pass, array in zip(row_passes, arrays, strict=True)
    ]
