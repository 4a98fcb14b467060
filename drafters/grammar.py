"""What a row's grammar forces, as a draft; alone, or on top of another drafter whose trees it cuts and extends.

The model still decides, so tokenisation and distribution stay those of plain constrained decoding (the jump-forward of
serving engines writes the text itself). A JSON answer then costs passes for its values and few for what is around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specdec.drafters import make_drafter
from specdec.drafters.none import NoDrafter
from specdec.grammar.trees import grown, pruned
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree


@dataclass(slots=True)
class GrammarDrafter(Drafter):
    """The trees of ``base`` without what a row's grammar excludes, and with what it forces. Free rows keep theirs.

    Args:
        base: who proposes where the grammar leaves a choice.
        drops_drawn: the verifier never looks at draws, so drawn nodes may be dropped, too.
        is_growing: False: cut only.
    """

    base: Drafter
    drops_drawn: bool = False
    is_growing: bool = True
    name: str = "grammar"

    @property
    def drafts_by_level(self) -> bool:
        """Whether the base does."""
        return self.base.drafts_by_level

    @property
    def model_s(self) -> float:
        return self.base.model_s

    @property
    def is_drawing(self) -> bool:
        """Whether the base does."""
        return self.base.is_drawing

    def begin(self, rows: Sequence[Row]) -> None:
        self.base.begin(rows)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        left = [self._left(row, limit) for row, limit in zip(rows, limits, strict=True)]
        trees = self.base.propose(rows, left, params, rng)
        drops_drawn = self.drops_drawn or params.is_greedy
        return [
            self._fitted(row, tree, limit, drops_drawn) for row, tree, limit in zip(rows, trees, limits, strict=True)
        ]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        self.base.observe(rows, trees, verdicts, scores)

    def end(self, rows: Sequence[Row]) -> None:
        self.base.end(rows)

    def _left(self, row: Row, limit: Limit) -> Limit:
        """What the base may draft: nothing where all is forced, if it would cost time or must not be cut."""
        is_dear = self.base.drafts_by_level or self.base.is_drawing
        if not (self.is_growing and is_dear) or row.grammar is None or not row.grammar.at(row.tokens).forced(1):
            return limit
        return replace(limit, depth=0, nodes=0)

    def _fitted(self, row: Row, tree: TokenTree, limit: Limit, drops_drawn: bool) -> TokenTree:
        if row.grammar is None:
            return tree
        tree = pruned(tree, row.grammar, row.tokens, drops_drawn=drops_drawn)
        return grown(tree, row.grammar, row.tokens, limit) if self.is_growing else tree


def build(context: DraftContext) -> Drafter:
    """Options: base (another drafter, "NAME:OPTION=VALUE,..." in quotes, such as base=hybrid)."""
    return _build(context, **context.options)


def _build(context: DraftContext, base: str | None = None) -> Drafter:
    inner = replace(context, options={})
    drafter = NoDrafter() if base in (None, "none") else make_drafter(str(base), inner)
    return GrammarDrafter(drafter, context.verifier.shares_target_noise)
