"""Verifiers, drafters and rng that are wrong on purpose, each as published code has been: the tests must reject them.

Most of them raise the acceptance rate, which is why nobody notices. ``CopiedRejection`` is exact, and each mutant
changes one thing of it; ``mutated`` makes the same kind of change in the text of production code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from enumeration import ScriptedNoise, ScriptedRowNoise
from torch import Tensor
from toy import Child, DrawToken, Kind, Origin, top, without

from specdec.interfaces import TargetDistributions, Verdict
from specdec.rng import PhiloxRowRng, RowRng, Stream
from specdec.tree import Draw, TokenTree


@dataclass(frozen=True)
class CopiedRejection:
    """Rules 2 to 6 once more, in pieces that a mutant can replace. This one is exact."""

    name: str = "mutant"
    lossless: bool = True
    chain_only: bool = False
    shares_target_noise: bool = False
    draws: frozenset[Draw] = frozenset(Draw)

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        nodes, tokens = [0], list[int]()
        while True:
            accepted, left, last = None, target.probs(nodes[-1]), 0
            rows: dict[int, Tensor] = {}
            for order, child in enumerate(self.order(tree, nodes[-1])):
                last, token, source = child, tree.tokens[child], tree.source(child)
                draft_probs = rows[source] if source in rows else drawn_from(tree, child)
                if self.accept(rng, float(left[token] / draft_probs[token]), len(tokens), order, child):
                    accepted = child
                    break
                left = self.residual(left, draft_probs)
                if source >= 0 and tree.draws[source] is Draw.WITHOUT_REPLACEMENT:
                    rows[source] = self.reject(draft_probs, token)
            if accepted is None:
                tokens.append(self.emit(rng, target, nodes, left, last, len(tokens)))
                return Verdict(tuple(nodes), tuple(tokens))
            nodes.append(accepted)
            tokens.append(tree.tokens[accepted])

    def order(self, tree: TokenTree, node: int) -> list[int]:
        return tree.children()[node]

    def accept(self, rng: RowRng, ratio: float, depth: int, order: int, child: int) -> bool:
        return rng.bernoulli(ratio, depth, order)

    def residual(self, left: Tensor, draft_probs: Tensor) -> Tensor:
        mass = (left - draft_probs).clamp(min=0)
        return mass / mass.sum() if mass.sum() > 0 else left

    def reject(self, draft_probs: Tensor, token: int) -> Tensor:
        """What a later sibling was drawn from, if drawn without replacement."""
        rest = draft_probs.clone()
        rest[token] = 0
        return rest / rest.sum() if rest.sum() > 0 else draft_probs

    def emit(
        self, rng: RowRng, target: TargetDistributions, nodes: list[int], left: Tensor, last: int, depth: int
    ) -> int:  # the last rejected child is 0 at a leaf
        del target, nodes
        return rng.draw(left, depth, Stream.RESIDUAL if last else Stream.TARGET)


class KeepsDraftProbs(CopiedRejection):
    """Rule 4 for children drawn without replacement: q is what it was before the rejection."""

    def reject(self, draft_probs: Tensor, token: int) -> Tensor:
        return draft_probs


class LeavesDraftProbsUnscaled(CopiedRejection):
    """Rule 5, but q is not renormalised after a rejection."""

    def reject(self, draft_probs: Tensor, token: int) -> Tensor:
        rest = draft_probs.clone()
        rest[token] = 0
        return rest


class SortsSiblings(CopiedRejection):
    """Rule 5, but siblings are tried by falling probability and not in draw order."""

    def order(self, tree: TokenTree, node: int) -> list[int]:
        return sorted(tree.children()[node], key=lambda child: -_own_prob(tree, child))


class PrunesSiblings(CopiedRejection):
    """Rule 5, but siblings of low probability of their own are dropped."""

    def order(self, tree: TokenTree, node: int) -> list[int]:
        return [child for child in tree.children()[node] if _own_prob(tree, child) > 0.25]


class TriesTopChildrenFirst(CopiedRejection):
    """Rule 6, but the top children come first, each with its p, and then the drawn one is judged by the same p."""

    def order(self, tree: TokenTree, node: int) -> list[int]:
        return sorted(tree.children()[node], key=lambda child: tree.source(child) >= 0)

    def residual(self, left: Tensor, draft_probs: Tensor) -> Tensor:
        return left if draft_probs.max() == 1 else super().residual(left, draft_probs)


class EmitsFromTarget(CopiedRejection):
    """No residual: after a rejection the token is drawn from the target's own distribution."""

    def emit(
        self, rng: RowRng, target: TargetDistributions, nodes: list[int], left: Tensor, last: int, depth: int
    ) -> int:
        return super().emit(rng, target, nodes, target.probs(nodes[-1]), last, depth) if left is not None else 0


class LeavesResidualUnscaled(CopiedRejection):
    """(p - q)+ is not normalised, so a later sibling is accepted too rarely."""

    def residual(self, left: Tensor, draft_probs: Tensor) -> Tensor:
        mass = (left - draft_probs).clamp(min=0)
        return mass if mass.sum() > 0 else left


class TakesAbsoluteResidual(CopiedRejection):
    """|p - q| and not (p - q)+."""

    def residual(self, left: Tensor, draft_probs: Tensor) -> Tensor:
        mass = (left - draft_probs).abs()
        return mass / mass.sum()


class SharesCoin(CopiedRejection):
    """Reseeding inside the acceptance loop: all siblings are judged by the same bernoulli."""

    def accept(self, rng: RowRng, ratio: float, depth: int, order: int, child: int) -> bool:
        return rng.bernoulli(ratio, depth, 0)


class JudgesByDraftNoise(CopiedRejection):
    """Reseeding between draft and verification: the bernoulli is made of the numbers that drew the child."""

    def accept(self, rng: RowRng, ratio: float, depth: int, order: int, child: int) -> bool:
        accept = min(ratio, 1.0)
        return rng.draw(torch.tensor([1 - accept, accept]), depth, Stream.DRAFT, child) == 1


class EmitsByDraftNoise(CopiedRejection):
    """The numbers that drew the rejected child also draw the token emitted in its place."""

    def emit(
        self, rng: RowRng, target: TargetDistributions, nodes: list[int], left: Tensor, last: int, depth: int
    ) -> int:
        if last:
            return rng.draw(left, depth, Stream.DRAFT, last)
        return super().emit(rng, target, nodes, left, last, depth)


class TakesBonusFromParent(CopiedRejection):
    """Off by one: after the last accepted node the token comes from its parent's distribution."""

    def emit(
        self, rng: RowRng, target: TargetDistributions, nodes: list[int], left: Tensor, last: int, depth: int
    ) -> int:
        left = left if last or len(nodes) == 1 else target.probs(nodes[-2])
        return super().emit(rng, target, nodes, left, last, depth)


@dataclass(frozen=True)
class EndsTextOnNan(CopiedRejection):
    """0 / 0 in the residual is taken for the end of the text."""

    end_of_text: int = 2

    def residual(self, left: Tensor, draft_probs: Tensor) -> Tensor:
        mass = (left - draft_probs).clamp(min=0)
        return mass / mass.sum()

    def emit(
        self, rng: RowRng, target: TargetDistributions, nodes: list[int], left: Tensor, last: int, depth: int
    ) -> int:
        if bool(left.isnan().any()):
            return self.end_of_text
        return super().emit(rng, target, nodes, left, last, depth)


def drawn_from(tree: TokenTree, node: int) -> Tensor:
    """What ``node`` was drawn from before any of its siblings was; all mass on its token if it was certain."""
    if tree.source(node) < 0:
        assert tree.draft_probs is not None
        return torch.zeros_like(tree.draft_probs[0]).index_fill_(0, torch.tensor(tree.tokens[node]), 1.0)
    assert tree.draft_probs is not None
    return tree.draft_probs[tree.source(node)]


def _own_prob(tree: TokenTree, node: int) -> float:
    return float(drawn_from(tree, node)[tree.tokens[node]])


def _lying_top_k(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
    origin = Origin(Draw.INDEPENDENT, tables[0])
    return [(token, origin) for token in top(tables[0], k)]


def _whole_plus_one(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
    best = top(tables[0], k - 1)
    drawn = draw(without(tables[0], best))
    return [(drawn, Origin(Draw.INDEPENDENT, tables[0])), *((token, None) for token in best)]


def _unscaled_plus_one(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
    best = top(tables[0], k - 1)
    rest = without(tables[0], best)
    unscaled = torch.where(rest > 0, tables[0], 0.0)
    return [(draw(rest), Origin(Draw.INDEPENDENT, unscaled)), *((token, None) for token in best)]


def _peeking(tables: Sequence[Tensor], k: int, draw: DrawToken) -> list[Child]:
    origin = Origin(Draw.INDEPENDENT, tables[0])
    drawn = draw(tables[0])
    return [(next(t for t in top(tables[0], 2) if t != drawn), None), (drawn, origin)]


LYING_TOP_K = Kind("top k declared as drawn from q", _lying_top_k)
WHOLE_PLUS_ONE = Kind("top plus one with q for q'", _whole_plus_one)
UNSCALED_PLUS_ONE = Kind("top plus one with q' not renormalised", _unscaled_plus_one)
PEEKING = Kind("certain child that depends on a younger draw", _peeking)


@dataclass(frozen=True, slots=True)
class EdgeNoise:
    """Draws walk every branch, but coins are those of a real rng class whose random words came out 0."""

    draws: ScriptedNoise
    row_noise: type[PhiloxRowRng] = PhiloxRowRng

    def at(self, row: int, position: int) -> EdgeRowNoise:
        class Zero(self.row_noise):  # type: ignore[misc, name-defined]
            def _words(self, tokens: Tensor, depth: int, stream: Stream, index: int) -> Tensor:
                return torch.zeros(len(tokens), dtype=torch.long)

        return EdgeRowNoise(self.draws.at(row, position), Zero(0, row, position))


@dataclass(frozen=True, slots=True)
class EdgeRowNoise:
    """One row's share of :class:`EdgeNoise`."""

    draws: ScriptedRowNoise
    coins: RowRng

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        return self.draws.draw(probs, depth, stream, index)

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        return self.coins.bernoulli(prob, depth, index)


@dataclass(frozen=True, slots=True)
class RefusingNoise:
    """Draws walk every branch; every bernoulli says no, as if each ratio had been rounded below one."""

    draws: ScriptedNoise

    def at(self, row: int, position: int) -> RowRng:
        return EdgeRowNoise(self.draws.at(row, position), _Refusing())


class _Refusing:
    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        raise NotImplementedError

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        return False


def mutated(module: ModuleType, old: str, new: str) -> ModuleType:
    """``module`` executed anew with the one occurrence of ``old`` in its text replaced by ``new``."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} must occur once in {module.__name__}: adapt the mutation to the new text"
    spec = importlib.util.spec_from_loader(module.__name__, loader=None)
    assert spec is not None
    mutant = importlib.util.module_from_spec(spec)
    # Names in sys.modules stay: dataclasses look their module up by name, and the original serves as well.
    exec(compile(source.replace(old, new), f"<mutant of {module.__name__}>", "exec"), mutant.__dict__)
    return mutant
