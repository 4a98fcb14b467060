"""A small causal LM as drafter: chains, and SpecInfer's token trees. It keeps a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.trees.expansion import ChildSampling, Shape, choose_child_sampling
from specdec.drafters.trees.growth import TreeBuilder, grow
from specdec.engine.causal_lm import CausalLM
from specdec.engine.replay import ReplayPool
from specdec.engine.wrapped import described
from specdec.errors import UnsupportedModelError
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Target, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree

_PADDING = 0.01  # share of a vocabulary that may be padding


@dataclass(slots=True)
class ModelDrafter(Drafter):
    """Drafts with a causal LM that shares the target's vocabulary: one forward pass for each level of all trees.

    Each level of every row is one pass under the draft model's own tree mask. After verification its cache keeps the
    accepted path, so nothing is processed twice. A row that the draft model has no token ids or no positions for goes on
    without drafts. A draft model that reads chains only gets chains, whatever the shape.

    Args:
        engine: the draft model.
        shape: which nodes get children (see Shape).
        children: how they are chosen; drawn ones are handed on with the distributions they were drawn from.
        vocab_size: the target's, if it differs from the draft model's by padding.
    """

    engine: CausalLM
    shape: Shape
    children: ChildSampling = ChildSampling.CERTAIN
    vocab_size: int | None = None  # the target's, where it differs in padding
    name: str = "model"
    _builders: dict[Row, TreeBuilder | None] = field(default_factory=dict, init=False)

    @property
    def drafts_by_level(self) -> bool:
        """Whether each level of a tree takes a pass of its own."""
        return True

    @property
    def model_s(self) -> float:
        return self.engine.model_s

    @property
    def is_drawing(self) -> bool:
        """Whether its nodes are drawn: then all of them must be verified."""
        return self.children.is_drawn

    def begin(self, rows: Sequence[Row]) -> None:
        readable = [row for row in rows if self._can_read(row, row.tokens)]
        self.engine.open(readable, may_outgrow=True)
        self._builders.update((row, None) for row in readable)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        self._drop_unreadable(rows)
        trees = []
        for row, limit in zip(rows, limits, strict=True):
            here = rng.at(row.key, len(row.tokens))
            trees.append(TreeBuilder(row, self._own_limit(row, limit), self.shape, self.children, params, here))
            if row in self._builders:
                self._builders[row] = trees[-1]
            else:
                trees[-1].frontier = []
        grow(self.engine, trees, self.vocab_size)
        return [tree.proposal() for tree in trees]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        # A token that the draft model never saw is processed together with the next root.
        open_rows, paths = [], []
        for row, verdict in zip(rows, verdicts, strict=True):
            if builders := self._builders.get(row):
                open_rows.append(row)
                paths.append(builders.scored_path(verdict.tokens[:-1]))
        self.engine.commit(open_rows, paths)

    def end(self, rows: Sequence[Row]) -> None:
        begun = [row for row in rows if row in self._builders]
        for row in begun:
            del self._builders[row]
        self.engine.close(begun)

    def _drop_unreadable(self, rows: Sequence[Row]) -> None:
        """Leave rows alone that have become what the draft model cannot read."""
        begun = (row for row in rows if row in self._builders)
        self.end([row for row in begun if not self._can_read(row, row.tokens[-1 - row.num_new :])])

    def _can_read(self, row: Row, new_tokens: Sequence[int]) -> bool:
        """Whether the draft model has an id for each of the row's ``new_tokens`` and a position for its root."""
        context = self.engine.context_length
        return max(new_tokens) < self.engine.vocab_size and (context is None or len(row.tokens) <= context)

    def _own_limit(self, row: Row, limit: Limit) -> Limit:
        """``limit`` within what the draft model can read: its positions, and chains if these are all it reads."""
        context = self.engine.context_length
        if context is not None:  # the deepest nodes are proposed unread
            limit = replace(limit, depth=min(limit.depth, max(context + 1 - len(row.tokens), 0)))
        if self.engine.chain_only and self.shape.branches_inside:
            limit = replace(limit, chain_only=True)
        return limit


def build(context: DraftContext) -> Drafter:
    """Options: shape (chain, best-first, 3x2x1, FILE.json), children, num_tokens, top_k, nodes, min_confidence."""
    return _build(context, **context.options)


def _build(
    context: DraftContext,
    shape: Any = "chain",
    children: str | None = None,
    num_tokens: int = 5,
    top_k: int = 4,
    nodes: int = 16,
    min_confidence: float | None = None,
) -> Drafter:
    if not context.draft_models:
        raise ValueError(
            "drafter 'model' needs a draft model: pass draft_model=... (on the command line: --drafter-model NAME_OR_PATH)"
        )
    if min_confidence is None:
        min_confidence = 0.3 if shape == "chain" else 0.0
    form = Shape.parse(str(shape), top_k, num_tokens, min_confidence, nodes)
    chosen = choose_child_sampling(children, context.verifier.shares_target_noise, form)
    takes_trees = not (context.target.chain_only or context.verifier.chain_only)  # else every shape gives a chain
    size = context.target.vocab_size
    parts = []
    for model in context.draft_models:
        tables = context.target.tables if isinstance(context.target, CausalLM) else None
        engine = CausalLM(model, replays=_replays(context.target, model), tables=tables, is_owner=False)
        check_vocabulary(engine, context.target)
        if takes_trees and form.branches_inside and engine.chain_only:
            raise ValueError(
                f"draft model {described(engine.module)} reads chains only ({engine.support.reason}), so it cannot draft "
                f"shape={shape}; use shape=chain"
            )
        parts.append(ModelDrafter(engine, form, chosen, size if size != engine.vocab_size else None))
    # Several draft models: SpecInfer's merge-based speculation.
    return parts[0] if len(parts) == 1 else HybridDrafter(parts, name="model")


def _replays(target: Target, model: Any) -> ReplayPool | None:
    """Recorded passes for a draft model, if its target has them."""
    return target.replays.beside(model) if isinstance(target, CausalLM) and target.replays else None


def check_vocabulary(engine: CausalLM, target: Target) -> None:
    """Refuse a draft model whose token ids cannot mean the same.

    Vocabularies of one family often differ in padding, rows at the end that no tokenizer uses: those are cut or
    filled. Exactness never depends on the draft; a mistake here would only cost accepted tokens.

    Raises:
        UnsupportedModelError: the two vocabularies differ by more than padding.
    """
    sizes = sorted((engine.vocab_size, target.vocab_size))
    if sizes[1] - sizes[0] > max(_PADDING * sizes[1], 0):
        raise UnsupportedModelError(
            f"draft model {described(engine.module)} has {engine.vocab_size} token ids and the target "
            f"{target.vocab_size}: they do not share a tokenizer; use a draft model of the same family, or a drafter "
            "without a model such as 'ngram'"
        )
