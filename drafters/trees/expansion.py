"""Which nodes of a tree get how many children, and how these are chosen: the settings of a tree that grows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from specdec.drafters.trees.shapes import Path as RankPath
from specdec.drafters.trees.shapes import StaticShape, read_shape


class ChildSampling(StrEnum):
    """How the children of a node are chosen from the draft distribution q."""

    CERTAIN = "certain"  # the most probable ones
    COUPLED = "coupled"  # the best ones under the noise that the verifier will use (drafter-invariant coupling)
    INDEPENDENT = "independent"  # k draws with replacement (SpecInfer)
    WITHOUT_REPLACEMENT = "without_replacement"  # k draws, each from what is left (Sequoia, RSD)
    TOP_PLUS_ONE = "top_plus_one"  # one draw from q without its top k - 1, and those (greedy multi-draft)

    @property
    def is_drawn(self) -> bool:
        """Whether any of them is drawn; the others are picked with certainty."""
        return self not in (ChildSampling.CERTAIN, ChildSampling.COUPLED)


@dataclass(frozen=True, slots=True)
class Shape:
    """Which nodes get how many children.

    Static: ``widths[i]`` children for every node of level i (SpecInfer's expansion), or as many as ``static`` has
    below the node's ranks (Sequoia, Medusa). Best-first (neither): ``top_k`` children for the ``top_k`` most probable
    nodes of each of ``depth`` levels, of which the most probable are proposed (EAGLE-2). A chain is the static shape
    of ones.
    """

    widths: tuple[int, ...] = ()
    top_k: int = 4
    depth: int = 5
    min_confidence: float = 0.0  # a node whose path is less probable under the draft model gets no children
    static: StaticShape | None = None

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.widths) or self.top_k < 1 or self.depth < 1:
            raise ValueError(f"a shape needs at least one child and one level, got {self}")

    @property
    def num_levels(self) -> int:
        return self.static.depth if self.static else len(self.widths) or self.depth

    @property
    def is_best_first(self) -> bool:
        return not self.widths and self.static is None

    @property
    def is_chain(self) -> bool:
        return set(self.widths) == {1}

    @property
    def branches_inside(self) -> bool:
        """Whether several nodes of a level may have children: then a draft model must be able to read trees."""
        if self.static is not None:
            depths = [len(parent) for parent in {path[:-1] for path in self.static.paths}]
            return len(depths) > len(set(depths))
        if self.widths:
            return any(width > 1 for width in self.widths[:-1])
        return self.top_k > 1 and self.depth > 1

    def num_children(self, path: RankPath) -> int:
        """How many children the node at ``path`` gets: its rank among its siblings, and its ancestors' before it."""
        if self.static is not None:
            return self.static.num_children(path)
        return self.widths[len(path)] if self.widths else self.top_k

    @classmethod
    def parse(cls, text: str, top_k: int, depth: int, min_confidence: float, num_nodes: int = 16) -> Shape:
        """ "chain" (``depth`` long), "best-first", widths such as "3x2x1", or a .json file.

        The file holds ``choices``, rank paths as in Medusa's configs, or is one of ``specdec tune``: then the best
        static shape of ``num_nodes`` nodes for what was measured.

        Raises:
            ValueError: another form, or a file that holds no shape.
        """
        if text.lower().endswith(".json"):
            return cls((), top_k, depth, min_confidence, read_shape(text, num_nodes))
        if text == "chain":
            return cls((1,) * depth, top_k, depth, min_confidence)
        if text == "best-first":
            return cls((), top_k, depth, min_confidence)
        try:
            return cls(tuple(int(width) for width in text.split("x")), top_k, depth, min_confidence)
        except ValueError:
            raise ValueError(
                f"shape must be chain, best-first widths such as 3x2x1, or a .json file, got {text!r}"
            ) from None


def choose_child_sampling(name: str | None, shares_target_noise: bool, shape: Shape) -> ChildSampling:
    """How to choose children: as ``name`` says, or what suits the verifier (``shares_target_noise``: it shares its noise).

    Raises:
        ValueError: an unknown name, or coupling with a verifier that does not share its noise.
    """
    if name is not None and name not in list(ChildSampling):
        raise ValueError(f"children must be one of {', '.join(ChildSampling)}, got {name!r}")
    if name == ChildSampling.COUPLED and not shares_target_noise:
        # A verifier that looks ahead would see noise that it meets again in a later step.
        raise ValueError(
            "children=coupled shares noise with verifier 'match'; choose certain or drawn children for others"
        )
    if name is not None:
        return ChildSampling(name)
    if shares_target_noise:
        return ChildSampling.COUPLED
    return ChildSampling.INDEPENDENT if shape.is_chain else ChildSampling.WITHOUT_REPLACEMENT
