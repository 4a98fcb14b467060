"""The mask of a grammar at a node, and where it stands among the other processors.

transformers asks a caller's own processors behind penalties and bans and before temperature and filters; there the mask
is applied, so that the text is that of ``generate()`` with a processor of the same library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from specdec.constraints import GrammarState
from specdec.distributions import NodeDistributions, WarperTransform
from specdec.errors import GrammarError
from specdec.grammar.row import RowGrammar
from specdec.interfaces import Row, Scores, TargetDistributions
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree


def masked(state: GrammarState, scores: Tensor) -> Tensor:
    """``scores`` (V,) with those tokens at -inf that ``state`` does not allow to follow.

    Raises:
        GrammarError: it allows none: the text cannot go on in this vocabulary.
    """
    allowed = state.allowed()
    if not bool(allowed.any()):
        raise GrammarError("the grammar allows no token here: the tokenizer cannot write what would have to follow")
    return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


def masked_at(row: Row, length: int, path: Sequence[int], scores: Tensor) -> Tensor:
    """``scores`` (V,) masked by the row's grammar, if it has one, behind its first ``length`` tokens and ``path``."""
    return scores if row.grammar is None else masked(row.grammar.at(row.tokens[:length], path), scores)


@dataclass(frozen=True, slots=True)
class GrammarTransform:
    """The mask of each row's grammar, then temperature, top-k, top-p and min-p; rows without a grammar are free."""

    params: SamplingParams

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetDistributions:
        if row.grammar is None:
            return WarperTransform(self.params).target_probs(row, tree, scores)
        apply = partial(self._apply, row, len(row.tokens), tree)
        return NodeDistributions(self.params, row, tree, scores.logits, apply, is_warped=False)

    def _apply(self, row: Row, length: int, tree: TokenTree, node: int, scores: Tensor) -> Tensor:
        return masked_at(row, length, tree.path_tokens(node), scores)


@dataclass(slots=True)
class GrammarProcessor:
    """A logits processor of transformers that keeps each row to a grammar of its own; good for one call of generate().

    With ``model.generate`` it is plain constrained decoding. In our loop it is asked by rows and nodes, whose grammars
    ``attach`` gives them. A batch of more rows than grammars, as ``num_return_sequences`` makes one, repeats each.

    Args:
        states: of empty texts, one for each row; None: the row is free.
        ends: the tokens behind which a row has ended.
    """

    states: Sequence[GrammarState | None]
    ends: Sequence[int]
    is_rowwise: bool = True
    _width: int = 0  # of the prompts
    _grammars: list[RowGrammar | None] = field(default_factory=list)

    def attach(self, rows: Sequence[Row]) -> None:
        """Give ``rows`` their grammars."""
        for row, state in zip(rows, self._repeated(len(rows)), strict=True):
            row.grammar = None if state is None else RowGrammar(state.fork(), len(row.tokens))

    def at_node(self, row: Row, length: int, path: Sequence[int], scores: Tensor) -> Tensor:
        return masked_at(row, length, path, scores)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._grammars:
            self._width = input_ids.shape[1]
            states = self._repeated(len(input_ids))
            self._grammars = [None if state is None else RowGrammar(state.fork(), 0) for state in states]
        texts = input_ids[:, self._width :].tolist()
        return torch.stack([self._masked(*each) for each in zip(self._grammars, texts, scores, strict=True)])

    def _masked(self, grammar: RowGrammar | None, text: list[int], scores: Tensor) -> Tensor:
        has_ended = any(end in text for end in self.ends)  # what follows is padding
        return scores if grammar is None or has_ended else masked(grammar.at(text), scores)

    def _repeated(self, num_rows: int) -> list[GrammarState | None]:
        if num_rows % len(self.states):
            raise ValueError(f"give one grammar, or one for each prompt: got {len(self.states)} for {num_rows} rows")
        return [state for state in self.states for _ in range(num_rows // len(self.states))]
