"""Shapes of draft trees, for all nodes of all steps at once. M tree nodes, N steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specdec.analysis.columns import Ints, Trace


def tree_parents(trace: Trace) -> Ints:
    """(M,) parents, numbered through all trees; -1 for roots."""
    steps = trace.steps
    shift = np.repeat(steps.tree_offsets[:-1], np.diff(steps.tree_offsets))
    return np.where(steps.tree_parents < 0, -1, steps.tree_parents + shift)


def node_depths(trace: Trace) -> Ints:
    """(M,) edges between the root of its tree and each node."""
    parents = tree_parents(trace)
    depth = np.zeros(len(parents), np.int64)
    at, above = np.arange(len(parents)), parents
    while True:
        below = above >= 0
        at, above = at[below], above[below]
        if not len(at):
            return depth
        depth[at] += 1
        above = parents[above]


def sibling_ranks(trace: Trace) -> Ints:
    """(M,) how many elder siblings each node has."""
    parents = tree_parents(trace)
    order = np.argsort(parents, kind="stable")
    ordered = parents[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.bool_)
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(ordered)), 0))
    ranks = np.empty(len(parents), np.int64)
    ranks[order] = np.arange(len(ordered)) - starts
    ranks[parents < 0] = 0
    return ranks


@dataclass(frozen=True, slots=True)
class Shapes:
    """What each step's tree (N,) looked like."""

    levels: Ints  # edges from the root to the deepest node
    leaves: Ints


def tree_shapes(trace: Trace) -> Shapes:
    """Depth and number of leaves of every tree."""
    starts = trace.steps.tree_offsets[:-1]
    if not len(starts):
        return Shapes(starts, starts)
    parents = tree_parents(trace)
    is_leaf = np.bincount(parents[parents >= 0], minlength=len(parents)) == 0
    return Shapes(np.maximum.reduceat(node_depths(trace), starts), np.add.reduceat(is_leaf.astype(np.int64), starts))
