"""A small causal LM as drafter: chains, and SpecInfer's token trees. It keeps a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.drafters.growth import Children, Growing, Shape
from specdec.drafters.hybrid import HybridDrafter
from specdec.errors import UnsupportedModelError
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.noise import Noise
from specdec.sampling import SamplingParams
from specdec.target import CausalLM
from specdec.tree import TokenTree


@dataclass(slots=True)
class ModelDrafter:
    """Drafts with a causal LM that shares the target's vocabulary: one forward pass for each level of all trees.

    Each level of every row is one pass under the draft model's own tree mask. After verification its cache keeps the
    accepted path, so nothing is processed twice.

    Args:
        engine: the draft model.
        shape: which nodes get children (see Shape).
        children: how they are chosen; drawn ones are handed on with the distributions they were drawn from.
        draw_offset: keeps the random numbers of several drawing drafters apart (see HybridDrafter).
    """

    engine: CausalLM
    shape: Shape
    children: Children = Children.CERTAIN
    draw_offset: int = 0
    name: str = "model"
    _growing: dict[Row, Growing | None] = field(default_factory=dict, init=False)

    @property
    def is_drawing(self) -> bool:
        """Whether its nodes are drawn: then all of them must be verified."""
        return self.children not in (Children.CERTAIN, Children.COUPLED)

    def begin(self, rows: Sequence[Row]) -> None:
        self.engine.open(rows)
        self._growing.update((row, None) for row in rows)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, noise: Noise
    ) -> list[TokenTree]:
        trees = [
            Growing(row, limit, self.shape, self.children, params, noise.at(row.key, len(row.tokens)), self.draw_offset)
            for row, limit in zip(rows, limits, strict=True)
        ]
        self._growing.update(zip(rows, trees, strict=True))
        while active := [tree for tree in trees if tree.frontier]:
            scores = self.engine.score(
                [tree.row for tree in active], [t.engine_tree for t in active], [len(t.scored) for t in active]
            )
            for tree, score in zip(active, scores, strict=True):
                tree.expand(score.logits)
        return [tree.proposal() for tree in trees]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        # A token that the draft model never saw is processed together with the next root.
        paths = []
        for row, verdict in zip(rows, verdicts, strict=True):
            growing = self._growing[row]
            paths.append(growing.scored_path(verdict.tokens[:-1]) if growing else [])
        self.engine.commit(rows, paths)

    def end(self, rows: Sequence[Row]) -> None:
        begun = [row for row in rows if row in self._growing]
        for row in begun:
            del self._growing[row]
        self.engine.close(begun)


def build(context: DraftContext) -> Drafter:
    """Options: shape (chain, best-first, 3x2x1), children, num_tokens, top_k, min_confidence."""
    return _build(context, **context.options)


def _build(
    context: DraftContext,
    shape: Any = "chain",
    children: str | None = None,
    num_tokens: int = 5,
    top_k: int = 4,
    min_confidence: float | None = None,
) -> Drafter:
    if not context.draft_models:
        raise ValueError(
            "drafter 'model' needs a draft model: pass draft_model=... (on the command line: --drafter-model NAME_OR_PATH)"
        )
    if min_confidence is None:
        min_confidence = 0.3 if shape == "chain" else 0.0
    form = Shape.parse(str(shape), top_k, num_tokens, min_confidence)
    chosen = _children(children, context.verifier.is_coupled, form)
    parts = [ModelDrafter(CausalLM(model), form, chosen) for model in context.draft_models]
    for part in parts:
        check_vocabulary(part.engine, context.target)
    # Several draft models: SpecInfer's merge-based speculation.
    return parts[0] if len(parts) == 1 else HybridDrafter(parts, name="model")


def _children(name: str | None, is_coupled: bool, shape: Shape) -> Children:
    if name is not None and name not in list(Children):
        raise ValueError(f"children must be one of {', '.join(Children)}, got {name!r}")
    if name == Children.COUPLED and not is_coupled:
        # A verifier that looks ahead would see noise that it meets again in a later step.
        raise ValueError(
            "children=coupled shares noise with verifier 'match'; choose certain or drawn children for others"
        )
    if name is not None:
        return Children(name)
    if is_coupled:
        return Children.COUPLED
    return Children.INDEPENDENT if set(shape.widths) == {1} else Children.WITHOUT_REPLACEMENT


def check_vocabulary(engine: CausalLM, target: Any) -> None:
    """Refuse a draft model whose token ids cannot mean the same.

    Raises:
        UnsupportedModelError: the two vocabularies have different sizes.
    """
    if engine.vocab_size != target.vocab_size:
        raise UnsupportedModelError(
            f"the draft model has {engine.vocab_size} token ids and the target {target.vocab_size}: they do not share "
            "a tokenizer; use a draft model of the same family, or a drafter without a model such as 'ngram'"
        )
