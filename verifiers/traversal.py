"""Traversal verification of trees: rule 8 of docs/verification.md (Weng et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from specdec.interfaces import BatchRule, TargetDistributions, Verdict
from specdec.rng import RowRng, Stream
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree
from specdec.verifiers.common.residual import SiblingDraftProbs, acceptance_ratio, normalised, subtract
from specdec.verifiers.common.walk import check_draws, follow


@dataclass(slots=True)
class _Visit:
    """A node on the current path, with what earlier rejections below it left."""

    node: int
    keep_prob: float  # of accepting the path that ends here
    residual: Tensor  # (V,) what the next token is emitted from if the path ends here
    waiting: list[int]  # children not yet rejected, in draw order
    draft: SiblingDraftProbs
    had_children: bool = field(init=False)

    def __post_init__(self) -> None:
        self.had_children = bool(self.waiting)


@dataclass(frozen=True, slots=True)
class TraversalVerifier:
    """Decide from the leaves up: a path is accepted as a whole, or loses its leaf and is looked at again.

    A child has keep(child) = min(1, keep(parent) p(x) / q(x)). The first leaf in draw order is accepted, with its
    path, with probability keep; otherwise it is deleted and its parent gets p = norm(R) and keep = S / (S + 1 - keep)
    with R = (keep p - q)+ and S = sum R. Equals block verification on a chain.
    """

    name: str = "traversal"
    lossless: bool = True
    chain_only: bool = False
    shares_target_noise: bool = False
    looks_ahead: bool = True
    draws: frozenset[Draw] = frozenset(Draw)

    def batch_rule(self, params: SamplingParams) -> BatchRule | None:
        return BatchRule.FOLLOW if params.is_greedy else None

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        check_draws(self, tree)
        if target.is_greedy:
            return follow(tree, lambda node, _: target.best(node))
        children = tree.children()
        path = [_Visit(0, 1.0, target.probs(0), list(children[0]), SiblingDraftProbs(tree))]
        num_coins = 0
        while True:
            here = path[-1]
            if here.waiting:
                child = here.waiting[0]
                token = tree.tokens[child]
                ratio = acceptance_ratio(float(here.residual[token]), here.draft.probs(child, here.residual), token)
                keep_prob = min(1.0, here.keep_prob * ratio)
                if keep_prob > 0.0:
                    path.append(
                        _Visit(child, keep_prob, target.probs(child), list(children[child]), SiblingDraftProbs(tree))
                    )
                else:
                    _delete_first(here, tree)
                continue
            num_coins += 1
            if len(path) == 1 or rng.bernoulli(here.keep_prob, 0, num_coins):
                stream = Stream.RESIDUAL if here.had_children else Stream.TARGET
                nodes = tuple(visit.node for visit in path)
                last = rng.draw(here.residual, len(nodes) - 1, stream)
                return Verdict(nodes, (*(tree.tokens[n] for n in nodes[1:]), last))
            path.pop()
            _delete_first(path[-1], tree)


def _delete_first(parent: _Visit, tree: TokenTree) -> None:
    """The parent's first waiting child was rejected."""
    child = parent.waiting.pop(0)
    token = tree.tokens[child]
    left = subtract(parent.keep_prob * parent.residual, parent.draft.probs(child, parent.residual), token)
    mass = float(left.sum())
    parent.residual = normalised(left, parent.residual)
    parent.keep_prob = mass / (mass + (1 - parent.keep_prob)) if mass > 0 else 0.0
    parent.draft.reject(child)


build = TraversalVerifier  # what the name of this file stands for
