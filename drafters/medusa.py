"""Medusa (Cai et al., 2024): heads on the target's last hidden state guess the next tokens, each its own place.

A head knows nothing of the others' guesses, so all nodes of a level have the same candidates, and a path is worth the
product of its tokens' probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from specdec.cpu.packed_linear import is_packed, pack
from specdec.drafters.heads.medusa_heads import MedusaHeads, load_medusa, pack_heads
from specdec.drafters.heads.shipped import draft_dtype, find, kept, require_causal_lm, version
from specdec.drafters.trees.expansion import ChildSampling, Shape, choose_child_sampling
from specdec.drafters.trees.ranking import DraftVocab, ranking
from specdec.drafters.trees.shapes import Path, StaticShape, Table, greedy_growth
from specdec.engine.offload import loaded
from specdec.interfaces import DraftContext, Drafter, Limit, ModelTarget, Row, Scores, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree, best_part

CHOICES = ("static", "dynamic")


@dataclass(slots=True)
class MedusaDrafter(Drafter):
    """Proposes the most probable paths through the heads' best tokens, all picked with certainty.

    A row's first step has no draft, because the target has not processed its prompt yet.

    Args:
        heads: the network; it moves to the target's device, and its layers are packed if the target's are.
        target: asked for its last hidden states, with every pass.
        choices: "static": the tree that did best on average; "dynamic": the best paths by this step's probabilities.
        children: CERTAIN, or COUPLED for a verifier that shares its noise.
        top_k: candidates of each head.
    """

    heads: MedusaHeads
    target: ModelTarget
    choices: str = "dynamic"
    children: ChildSampling = ChildSampling.CERTAIN
    top_k: int = 10
    name: str = "medusa"
    _hidden: dict[Row, Tensor | None] = field(default_factory=dict, init=False)  # (H,) of the newest verified token
    _vocab: DraftVocab | None = field(default=None, init=False)
    _output: Any = field(init=False)
    _dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.target.request(hidden=True)
        self._dtype = draft_dtype(self.target)
        self.heads = self.heads.to(self.target.device, self._dtype).eval()
        self._output = kept(self.target, ("medusa output", self.heads), self._output_layer)
        if is_packed(self.target.model):
            pack_heads(self.heads)
        if self.heads.draft_vocab is not None:
            self._vocab = DraftVocab(self.heads.draft_vocab, self.target.vocab_size)

    def _output_layer(self) -> Any:
        """What makes logits of the states of heads without an output matrix: the target's, or some rows of it."""
        layer: Any = self.target.model.get_output_embeddings()
        ids = self.heads.draft_vocab
        if not self.heads.shares_output or ids is None:
            return layer
        has_bias = getattr(layer, "bias", None) is not None
        part = nn.Linear(self.heads.hidden_size, len(ids), has_bias, ids.device, self._dtype)
        with torch.no_grad(), loaded(layer):
            part.weight.copy_(layer.weight[ids])
            if has_bias:
                part.bias.copy_(layer.bias[ids])
        whole = nn.Sequential(part)
        if is_packed(self.target.model):
            pack(whole)
        return whole

    def begin(self, rows: Sequence[Row]) -> None:
        self._hidden.update((row, None) for row in rows)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        trees = [TokenTree.root(row.tokens[-1]) for row in rows]
        states = [self._hidden[row] for row in rows]
        drafted = [i for i, limit in enumerate(limits) if states[i] is not None and min(limit.depth, limit.nodes) > 0]
        if drafted:
            logits = self._logits(torch.stack([states[i] for i in drafted]))  # type: ignore[misc]
            for column, i in enumerate(drafted):
                trees[i] = self._tree(rows[i], limits[i], logits[:, column], params, rng)
        return trees

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        """(heads, B, Vd) at the states ``hidden`` (B, H)."""
        hidden = hidden.to(self._dtype)
        if not self.heads.shares_output:
            return self.heads(hidden)  # type: ignore[no-any-return]
        states = self.heads.states(hidden)
        whole_vocabulary = self.heads.draft_vocab is None  # then the matrix is the target's own layer
        return self._output(states.to(self.target.model.dtype) if whole_vocabulary else states)  # type: ignore[no-any-return]

    def _tree(self, row: Row, limit: Limit, logits: Tensor, params: SamplingParams, rng: Rng) -> TokenTree:
        """One row's tree from its ``logits`` (heads, Vd)."""
        logits = logits[: limit.depth]
        depth = len(logits)
        if self.children is ChildSampling.COUPLED and not params.is_greedy:
            here = rng.at(row.key, len(row.tokens))
            rows = torch.split(logits, 1)
            probs = torch.cat(
                [ranking(head_logits, params, here, d, self._vocab) for d, head_logits in enumerate(rows)]
            )
        else:
            probs = ranking(logits, params, None, 0, self._vocab)
        width = 1 if limit.chain_only else min(self.top_k, probs.shape[-1])
        best = probs.topk(width)
        tokens = (best.indices if self._vocab is None else self._vocab.ids.take(best.indices)).tolist()
        values = best.values.double()
        # Rounding may make a distribution sum to more than 1.
        table = (values / values.sum(-1, keepdim=True).clamp(min=1)).tolist()
        tree = _laid_out(row.tokens[-1], self._paths(table, limit.nodes, depth, width), tokens, table)
        return best_part(tree, tree.estimates, limit.nodes)

    def _paths(self, table: Table, num_nodes: int, depth: int, width: int) -> Sequence[Path]:
        """The paths of ranks to propose, parents first."""
        if self.choices == "dynamic":
            return greedy_growth(table, num_nodes, depth).paths
        if self.heads.accuracies:
            return _average_best(tuple(ranks[:width] for ranks in self.heads.accuracies), num_nodes, depth).paths
        return [path for path in self.heads.choices if len(path) <= depth and max(path) < width]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        for row, tree, verdict, score in zip(rows, trees, verdicts, scores, strict=True):
            hidden = self.target.hidden(score)
            self._hidden[row] = hidden[len(hidden) - len(tree) + verdict.nodes[-1]].clone()

    def end(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._hidden.pop(row, None)


@cache
def _average_best(accuracies: tuple[tuple[float, ...], ...], num_nodes: int, depth: int) -> StaticShape:
    return greedy_growth(accuracies, num_nodes, depth)


def _laid_out(root: int, paths: Sequence[Path], tokens: Sequence[Sequence[int]], table: Table) -> TokenTree:
    """The tree of ``paths``, without those that the heads exclude; ``tokens`` and ``table`` (heads, ranks)."""
    place: dict[Path, int] = {(): 0}
    nodes, parents, estimates = [root], [-1], [1.0]
    for path in paths:
        depth, rank = len(path) - 1, path[-1]
        if path[:-1] in place and table[depth][rank] > 0:
            parent = place[path[:-1]]
            place[path] = len(nodes)
            nodes.append(tokens[depth][rank])
            parents.append(parent)
            estimates.append(estimates[parent] * table[depth][rank])
    return TokenTree(tuple(nodes), tuple(parents), estimates=tuple(estimates))


def build(context: DraftContext) -> Drafter:
    """Options: path (default: the shipped heads), choices (static, dynamic), children (certain, coupled), top_k."""
    return _build(context, **context.options)


def _build(
    context: DraftContext,
    path: Any = None,
    choices: str | None = None,
    children: str | None = None,
    top_k: int = 10,
) -> Drafter:
    target = require_causal_lm(context.target, "medusa")
    place = find("medusa", "smollm2-135m-medusa", target, path)
    key = ("medusa", *version(place))
    heads = kept(target, key, lambda: load_medusa(place, target.hidden_size, target.vocab_size))
    has_static = bool(heads.choices or heads.accuracies)
    if choices not in (None, *CHOICES):
        raise ValueError(f"choices must be one of {', '.join(CHOICES)}, got {choices!r}")
    if choices == "static" and not has_static:
        raise ValueError(f"the heads at {place} hold no measured choices or accuracies; use choices=dynamic")
    chosen = choose_child_sampling(children, context.verifier.shares_target_noise, Shape())
    if chosen.is_drawn:
        if children is not None:
            raise ValueError(f"medusa's children are certain or coupled, got {children!r}: its heads draw no paths")
        chosen = ChildSampling.CERTAIN
    return MedusaDrafter(heads, target, choices or ("static" if has_static else "dynamic"), chosen, top_k)
