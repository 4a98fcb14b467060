"""EAGLE (Li et al., 2024, 2025): a single decoder layer that reads the hidden states of the target drafts trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.drafters.heads.eagle_engine import EagleEngine
from specdec.drafters.heads.eagle_format import load_eagle
from specdec.drafters.heads.shipped import find, kept, require_causal_lm, version
from specdec.drafters.trees.expansion import ChildSampling, Shape, choose_child_sampling
from specdec.drafters.trees.growth import TreeBuilder, grow
from specdec.drafters.trees.ranking import DraftVocab
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree


@dataclass(slots=True)
class EagleDrafter(Drafter):
    """Grows trees with an EAGLE head: one small pass for each level of all trees.

    A row's first step has no draft, because the target has not processed its prompt yet.

    Args:
        engine: the head beside its target.
        shape: which nodes get children (see Shape).
        children: how they are chosen; drawn ones are handed on with distributions over the target's vocabulary.
    """

    engine: EagleEngine
    shape: Shape
    children: ChildSampling = ChildSampling.CERTAIN
    name: str = "eagle"
    _begun: set[Row] = field(default_factory=set, init=False)
    _vocab: DraftVocab = field(init=False)

    def __post_init__(self) -> None:
        self._vocab = DraftVocab(self.engine.cell.target_ids(), self.engine.target.vocab_size)

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
        self.engine.open(rows)
        self._begun.update(rows)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        trees = []
        for row, limit in zip(rows, limits, strict=True):
            here = rng.at(row.key, len(row.tokens))
            trees.append(TreeBuilder(row, limit, self.shape, self.children, params, here, self._vocab))
            if not self.engine.is_ready(row):
                trees[-1].frontier = []
        grow(self.engine, trees)
        return [tree.proposal() for tree in trees]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        self.engine.commit(rows)
        for row, tree, verdict, score in zip(rows, trees, verdicts, scores, strict=True):
            self.engine.read(row, score, len(tree), verdict.nodes)

    def end(self, rows: Sequence[Row]) -> None:
        begun = [row for row in rows if row in self._begun]
        self._begun.difference_update(begun)
        self.engine.close(begun)


def build(context: DraftContext) -> Drafter:
    """Options: path (default: shipped), layers (2+16+29), shape (best-first, chain, 3x2, FILE.json), children, num_tokens, top_k, nodes."""
    return _build(context, **context.options)


def _build(
    context: DraftContext,
    path: Any = None,
    layers: Any = None,
    shape: Any = "best-first",
    children: str | None = None,
    num_tokens: int = 5,
    top_k: int = 4,
    nodes: int = 16,
    min_confidence: float = 0.1,
) -> Drafter:
    target = require_causal_lm(context.target, "eagle")
    place = find("eagle", "smollm2-135m-eagle3", target, path)
    form = Shape.parse(str(shape), top_k, num_tokens, min_confidence, nodes)
    chosen = choose_child_sampling(children, context.verifier.shares_target_noise, form)
    chosen_layers = None if layers is None else parse_layers(layers)
    key = ("eagle", *version(place), chosen_layers)
    cell = kept(target, key, lambda: load_eagle(place, target.hidden_size, target.vocab_size, chosen_layers))
    return EagleDrafter(EagleEngine(cell, target), form, chosen)


def parse_layers(text: object) -> tuple[int, ...]:
    """Entries of the target's ``hidden_states`` from text such as "2+16+29", in that order.

    Raises:
        ValueError: no numbers joined by +.
    """
    parts = str(text).split("+")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(
            "layers must be entries of the target's hidden_states joined by +, such as 2+16+29 (0 is the embeddings, i "
            f"what layer i - 1 puts out), got {text!r}"
        )
    return tuple(int(part) for part in parts)
