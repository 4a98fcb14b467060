"""What a trace holds, as columns. Letters for shapes: N steps, K kept nodes of all steps, M tree nodes of all steps.

A step is one row's share of one pass. Its kept nodes are ``kept_offsets[i]:kept_offsets[i + 1]`` of the flat columns
``nodes`` and ``tokens``; its tree is ``tree_offsets[i]:tree_offsets[i + 1]`` of ``tree_tokens`` and ``tree_parents``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PLAIN, BASELINE = "plain", "hf-generate"  # methods that draft nothing: our own loop, transformers' generate()


@dataclass(frozen=True, slots=True)
class Label:
    """Whose step or output it is."""

    run: int  # number of the file among those loaded
    method: str
    drafter: str | None
    verifier: str | None
    question_id: str
    category: str
    turn: int

    @property
    def name(self) -> str:
        """The drafter with its options, or the method if it has none."""
        return self.drafter or self.method


@dataclass(frozen=True, slots=True)
class Run:
    """One file."""

    path: str
    provenance: Mapping[str, Any]
    warnings: tuple[str, ...] = ()  # what a run that was cut short lacks
    texts: Mapping[int, str] = field(default_factory=dict)  # of tokens; empty in older traces

    def text(self, token: int) -> str:
        """The token's text, or its id in angle brackets where the trace does not tell it."""
        return self.texts.get(token, f"<{token}>")

    @property
    def settings(self) -> Mapping[str, Any]:
        settings = self.provenance.get("settings")
        return settings if isinstance(settings, Mapping) else {}


@dataclass(frozen=True, slots=True)
class Output:
    """What one method emitted for one turn; seconds are those of all rows of the group together."""

    label: Label
    group: int
    num_rows: int
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    wall_s: float
    prefill_s: float
    lossless: bool | None  # None: an older trace, which does not tell

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Steps:
    """Columns of all steps. The optional ones are NaN where a step lacks them."""

    label: Ints  # (N,) into Trace.labels
    row: Ints
    index: Ints
    position: Ints
    num_rows: Ints
    draft_s: Floats
    score_s: Floats
    verify_s: Floats
    finished: Bools
    kept_offsets: Ints  # (N + 1,)
    nodes: Ints  # (K,)
    tokens: Ints  # (K,)
    tree_offsets: Ints  # (N + 1,)
    tree_tokens: Ints  # (M,)
    tree_parents: Ints  # (M,)
    node_probs: Floats | None = None  # (M,)
    draft_probs: Floats | None = None  # (M,)
    estimates: Floats | None = None  # (M,)
    token_probs: Floats | None = None  # (K,)
    entropies: Floats | None = None  # (K,)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def num_emitted(self) -> Ints:
        return np.diff(self.kept_offsets)

    @property
    def num_accepted(self) -> Ints:
        return self.num_emitted - 1

    @property
    def num_drafted(self) -> Ints:
        return np.diff(self.tree_offsets) - 1

    def take(self, where: Bools) -> Steps:
        """The steps of a mask (N,)."""
        kept = np.repeat(where, self.num_emitted)
        nodes = np.repeat(where, np.diff(self.tree_offsets))
        chosen: dict[str, Any] = {}
        for item in fields(self):
            column = getattr(self, item.name)
            if column is None:
                continue
            if item.name in ("kept_offsets", "tree_offsets"):
                chosen[item.name] = offsets_of(np.diff(column)[where])
            else:
                chosen[item.name] = column[kept if item.name in KEPT else nodes if item.name in TREE else where]
        return Steps(**chosen)


KEPT = frozenset({"nodes", "tokens", "token_probs", "entropies"})
TREE = frozenset({"tree_tokens", "tree_parents", "node_probs", "draft_probs", "estimates"})


def offsets_of(lengths: Ints) -> Ints:
    """(n + 1,) where pieces of these lengths begin and end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Trace:
    """One or many runs."""

    runs: tuple[Run, ...]
    labels: tuple[Label, ...]
    steps: Steps
    outputs: tuple[Output, ...]
    prompts: Mapping[tuple[int, str, int], tuple[int, ...]] = field(
        default_factory=dict
    )  # (run, question, turn) -> ids

    @property
    def names(self) -> list[str]:
        """Methods in the order in which they were measured."""
        return list(dict.fromkeys(label.name for label in self._met_labels()))

    @property
    def drafting(self) -> list[str]:
        """Methods that have steps and drafted something."""
        drafted = self.per_label(self.steps.num_drafted)
        return list(dict.fromkeys(self.labels[i].name for i in np.flatnonzero(drafted)))

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(label.category for label in self._met_labels()))

    def _met_labels(self) -> list[Label]:
        """Labels that an output or a step has: a selection keeps the others too, so that codes stay as they are."""
        with_steps = np.flatnonzero(self.per_label(np.ones(len(self.steps))))
        return [output.label for output in self.outputs] + [self.labels[i] for i in with_steps]

    @property
    def warnings(self) -> list[str]:
        return [f"{run.path}: {warning}" for run in self.runs for warning in run.warnings]

    def per_label(self, values: Ints | Floats | Bools) -> Floats:
        """(labels,) sums of a column (N,) of steps."""
        return np.bincount(self.steps.label, values, len(self.labels)).astype(np.float64)

    def table(self) -> dict[str, NDArray[Any]]:
        """One row for each step, ready for ``pandas.DataFrame``: labels, counts and seconds, without the trees."""
        labels = {name: self.column(name) for name in ("run", "name", "question_id", "category", "turn")}
        steps = self.steps
        counts = {
            "num_drafted": steps.num_drafted,
            "num_accepted": steps.num_accepted,
            "num_emitted": steps.num_emitted,
        }
        same = ("index", "position", "num_rows", "draft_s", "score_s", "verify_s", "finished")
        return labels | {name: getattr(steps, name) for name in same} | counts

    def column(self, name: str) -> NDArray[Any]:
        """(N,) an attribute of each step's label, such as ``name``, ``category`` or ``question_id``."""
        return np.array([getattr(label, name) for label in self.labels] or [""])[self.steps.label]

    def select(self, names: str | Iterable[str] | None = None, categories: Sequence[str] | None = None) -> Trace:
        """The steps and outputs of some methods or categories.

        Raises:
            ValueError: a name or category that the trace does not hold.
        """
        wanted = [names] if isinstance(names, str) else None if names is None else list(names)
        for what, asked, present in (("method", wanted, self.names), ("category", categories, self.categories)):
            for name in asked or ():
                if name not in present:
                    raise ValueError(f"the trace has no {what} {name!r}; it has {', '.join(present) or 'none'}")

        def fits(label: Label) -> bool:
            return (wanted is None or label.name in wanted) and (categories is None or label.category in categories)

        good = np.array([fits(label) for label in self.labels], dtype=np.bool_)
        where = good[self.steps.label] if len(self.labels) else np.zeros(0, np.bool_)
        outputs = tuple(output for output in self.outputs if fits(output.label))
        return replace(self, steps=self.steps.take(where), outputs=outputs)
