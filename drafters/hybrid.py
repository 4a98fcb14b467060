"""Several drafters as one: their trees are merged under one node budget, best estimates first.

Where the text repeats itself prompt lookup is nearly always right; elsewhere another drafter still has a guess. The
hybrid learns how much each drafter's estimates are worth and gives the budget to the best nodes of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from specdec.budget.calibration import Calibration
from specdec.drafters.trees.merge import merge
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.release import call_all
from specdec.rng import PartNoise, Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree, best_part

ENOUGH = 2.0  # accepted tokens: more are rarely won by also running a network


@dataclass(slots=True)
class HybridDrafter(Drafter):
    """Merges the trees of ``parts``.

    Drawn trees are always kept whole, because dropping a drawn node for what it is would not be exact: drafters that
    draw (``is_drawing``) share the budget in equal parts, fixed beforehand, and draw by numbers of their own
    (``PartNoise``). What they leave of the budget goes to the best nodes that the others picked. Each part's estimates
    are calibrated by what was accepted. A part may be a hybrid itself.

    Drafters that run a network level by level (``drafts_by_level``) are asked last, and not for rows in which the others'
    trees already promise ``enough`` accepted tokens.
    """

    parts: Sequence[Drafter]
    name: str = "hybrid"
    enough: float = ENOUGH
    _calibrations: list[Calibration] = field(init=False)
    _drawing: list[int] = field(init=False)  # the parts that draw
    _proposed: dict[Row, list[TokenTree]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"a hybrid needs at least two drafters, got {len(self.parts)}")
        for part in self.parts:
            _check_declared(part)
        self._calibrations = [Calibration() for _ in self.parts]
        self._drawing = [k for k, part in enumerate(self.parts) if part.is_drawing]

    @property
    def drafts_by_level(self) -> bool:
        """Whether any part is."""
        return any(part.drafts_by_level for part in self.parts)

    @property
    def model_s(self) -> float:
        return sum(part.model_s for part in self.parts)

    @property
    def is_drawing(self) -> bool:
        """Whether any part is."""
        return bool(self._drawing)

    def begin(self, rows: Sequence[Row]) -> None:
        for part in self.parts:
            part.begin(rows)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        proposals: list[list[TokenTree]] = [[] for _ in self.parts]
        calibrated: list[list[TokenTree]] = [[] for _ in self.parts]
        promised = [0.0] * len(rows)
        for k in sorted(range(len(self.parts)), key=lambda k: self.parts[k].drafts_by_level):
            part, shares = self.parts[k], self._share(k, limits)
            if part.drafts_by_level:
                none = (replace(share, depth=0, nodes=0) for share in shares)
                shares = [n if p >= self.enough else s for s, n, p in zip(shares, none, promised, strict=True)]
            proposals[k] = part.propose(rows, shares, params, PartNoise(rng, k, len(self.parts)))
            if k not in self._drawing:
                _check_certain(part.name, proposals[k])
            calibrated[k] = [self._calibrated(k, tree) for tree in proposals[k]]
            if not part.drafts_by_level:
                promised = [max(p, sum(t.estimates[1:])) for p, t in zip(promised, calibrated[k], strict=True)]
        self._proposed.update(zip(rows, map(list, zip(*proposals, strict=True)), strict=True))
        return [_combine(own, limit) for own, limit in zip(zip(*calibrated, strict=True), limits, strict=True)]

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        for row, tree, verdict in zip(rows, trees, verdicts, strict=True):
            for calibration, proposal in zip(self._calibrations, self._proposed[row], strict=True):
                _learn(calibration, proposal, tree, verdict)
        for part in self.parts:
            part.observe(rows, trees, verdicts, scores)

    def end(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._proposed.pop(row, None)
        call_all(partial(part.end, rows) for part in self.parts)

    def _share(self, part: int, limits: Sequence[Limit]) -> Sequence[Limit]:
        """The limits of one part: drawn trees are kept whole, so that they must fit beside each other."""
        if part not in self._drawing:
            return limits
        if limits and limits[0].chain_only and part != self._drawing[0]:
            return [replace(limit, depth=0, nodes=0) for limit in limits]
        count = 1 if limits and limits[0].chain_only else len(self._drawing)
        return [replace(limit, nodes=limit.nodes // count) for limit in limits]

    def _calibrated(self, part: int, tree: TokenTree) -> TokenTree:
        if not tree.estimates:
            return tree
        return replace(tree, estimates=tuple(self._calibrations[part].values(tree)))


def _check_declared(part: Drafter) -> None:
    """Refuse a part that leaves open how it must be treated; drafters of other packages are not type-checked."""
    missing = [trait for trait in ("drafts_by_level", "is_drawing") if not hasattr(part, trait)]
    if missing:
        raise ValueError(
            f"drafter {part.name!r} must declare {' and '.join(missing)} to be part of a hybrid: let "
            f"{type(part).__name__} inherit from specdec.interfaces.Drafter, or define them"
        )


def _check_certain(name: str, trees: Sequence[TokenTree]) -> None:
    """Drawn nodes of a part that is not known to draw could be dropped for what they are."""
    if not all(tree.is_certain for tree in trees):
        raise ValueError(f"drafter {name!r} draws nodes, so its is_drawing must be True for it to be part of a hybrid")


def _combine(trees: Sequence[TokenTree], limit: Limit) -> TokenTree:
    """The drawn trees whole, then the best nodes that were picked, up to the limit."""
    drawn = [tree for tree in trees if not tree.is_certain]
    picked = [tree for tree in trees if tree.is_certain and len(tree) > 1]
    if limit.chain_only:
        # Only picked chains may compete by their worth.
        return drawn[0] if drawn else max(picked, key=_worth, default=trees[0])
    room = limit.nodes - sum(len(tree) - 1 for tree in drawn)
    if picked:
        union = merge(picked)
        drawn.append(best_part(union, union.estimates or (1.0,) * len(union), room))
    return merge(drawn or [trees[0]])


def _worth(tree: TokenTree) -> float:
    return sum(tree.estimates[1:]) if tree.estimates else float(len(tree) - 1)


def _learn(calibration: Calibration, proposal: TokenTree, verified: TokenTree, verdict: Verdict) -> None:
    """Count the proposed nodes that were verified: which of them lie on the accepted path."""
    if not proposal.estimates:
        return
    places = {(-1, verified.tokens[0]): 0}
    for node in range(1, len(verified)):
        places.setdefault((verified.parents[node], verified.tokens[node]), node)
    accepted = set(verdict.nodes)
    where = [0]
    for node in range(1, len(proposal)):
        parent = where[proposal.parents[node]]
        place = places.get((parent, proposal.tokens[node]), -1) if parent >= 0 else -1
        where.append(place)
        if place >= 0:
            above = proposal.estimates[proposal.parents[node]] if parent in accepted else None
            calibration.learn(proposal.estimates[node], place in accepted, above)


def build(context: DraftContext) -> Drafter:
    """Options: parts (names joined by +, such as parts=ngram+recycling), enough, options of the parts as part.option=value."""
    return _build(context, **context.options)


def _build(context: DraftContext, parts: str = "ngram+recycling", enough: float = ENOUGH, **options: Any) -> Drafter:
    from specdec.drafters import build_drafter

    names = parts.split("+")
    stray = [key for key in options if key.split(".")[0] not in names]
    if stray:
        raise ValueError(f"hybrid options are parts=A+B or part.option=value for one of {names}, got {stray}")
    drafters = []
    for name in names:
        own = {key.split(".", 1)[1]: value for key, value in options.items() if key.startswith(name + ".")}
        drafters.append(build_drafter(name, replace(context, options=own)))
    return HybridDrafter(drafters, enough=enough)
