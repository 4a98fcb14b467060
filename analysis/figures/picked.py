"""Which method and which step a figure shows: chosen by rule, never by hand, so that a new run gives a new picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specdec.analysis.acceptance import attempts, mean_acceptance_length
from specdec.analysis.columns import BASELINE, Ints, Label, Run, Trace
from specdec.analysis.figures.style import MissingDataError
from specdec.analysis.nodes import tree_shapes
from specdec.analysis.speedup import speedups


@dataclass(frozen=True, slots=True)
class Picked:
    """One step, as lists; n nodes in its tree, k kept."""

    run: Run
    label: Label
    position: int
    nodes: list[int]  # (k,)
    tokens: list[int]  # (k,)
    tree_tokens: list[int]  # (n,)
    tree_parents: list[int]  # (n,)
    node_probs: list[float]  # (n,) empty where the trace does not tell
    token_probs: list[float]  # (k,)
    estimates: list[float]  # (n,) NaN where the drafter made no guess

    @property
    def name(self) -> str:
        return self.label.name

    def text(self, node: int) -> str:
        return self.run.text(self.tree_tokens[node])

    def token_text(self, i: int) -> str:
        return self.run.text(self.tokens[i])

    def children(self, node: int) -> list[int]:
        return [i for i, parent in enumerate(self.tree_parents) if parent == node]

    @property
    def depths(self) -> list[int]:
        depth: list[int] = []
        for parent in self.tree_parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return depth

    @property
    def first_choice(self) -> list[int]:
        """The path of first children: what a drafter that proposes chains would have proposed."""
        path = [0]
        while below := self.children(path[-1]):
            path.append(below[0])
        return path


def best_method(trace: Trace) -> str:
    """The fastest method that drafted; by tokens a pass where the trace has no baseline."""
    drafting = trace.drafting
    if not drafting:
        raise MissingDataError("a trace of a method that drafted something")
    if BASELINE in trace.names:
        by_method = speedups(trace)
        return max(drafting, key=lambda name: by_method[name].value if name in by_method else 0.0)
    return max(drafting, key=lambda name: mean_acceptance_length(trace.select(name)).value)


def branching_method(trace: Trace) -> str:
    """The method whose trees branch most often, counted over steps."""
    branching = {name: int((tree_shapes(trace.select(name)).leaves > 1).sum()) for name in trace.drafting}
    if not any(branching.values()):
        raise MissingDataError("a trace of a drafter that proposes trees, such as recycling or hybrid")
    return max(branching, key=lambda name: branching[name])


def pick_step(
    trace: Trace, method: str, *, max_nodes: int, max_accepted: int = 8, prefer_branches: bool = False
) -> Picked:
    """A step of ``method`` that shows much: accepted and rejected nodes both, within the limits.

    With ``prefer_branches`` first the step where branches brought most: accepted drafts that first choices alone would
    have missed. Then most of min(accepted, 4), then the smallest; the first of equals.
    """
    own = trace.select(method)
    steps = own.steps
    shapes = tree_shapes(own)
    accepted, drafted = steps.num_accepted, steps.num_drafted
    fits = (drafted + 1 <= max_nodes) & ~steps.finished & (accepted > 0) & (accepted <= max_accepted)
    if not fits.any():
        raise MissingDataError(f"a step of {method} with an accepted token and at most {max_nodes} nodes")
    has_both = accepted < drafted
    score = 100.0 * has_both + 10 * np.minimum(accepted, 4) - drafted / 100
    if prefer_branches:
        score += 1000.0 * np.minimum(accepted - _first_choices(own), 3) + np.minimum(shapes.leaves, 6)
    return picked(own, int(np.argmax(np.where(fits, score, -np.inf))))


def _first_choices(trace: Trace) -> Ints:
    """(N,) how many tokens each step would have had accepted from the chain of first children."""
    all_attempts = attempts(trace)
    strayed = (all_attempts.rank != 0).astype(np.int64)
    total = np.cumsum(strayed)
    before = np.concatenate([[0], total])[trace.steps.kept_offsets[:-1]]
    still = (total - before[all_attempts.step]) == 0
    return np.bincount(all_attempts.step, still, len(trace.steps)).astype(np.int64)


def picked(trace: Trace, i: int) -> Picked:
    """Step number ``i``."""
    steps = trace.steps
    kept = slice(steps.kept_offsets[i], steps.kept_offsets[i + 1])
    tree = slice(steps.tree_offsets[i], steps.tree_offsets[i + 1])
    label = trace.labels[steps.label[i]]
    return Picked(
        run=trace.runs[label.run],
        label=label,
        position=int(steps.position[i]),
        nodes=steps.nodes[kept].tolist(),
        tokens=steps.tokens[kept].tolist(),
        tree_tokens=steps.tree_tokens[tree].tolist(),
        tree_parents=steps.tree_parents[tree].tolist(),
        node_probs=[] if steps.node_probs is None else steps.node_probs[tree].tolist(),
        token_probs=[] if steps.token_probs is None else steps.token_probs[kept].tolist(),
        estimates=[] if steps.estimates is None else steps.estimates[tree].tolist(),
    )
