"""Rows, random token trees and accepts for engine tests over the models of the zoo."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from zoo import FAMILIES, VOCAB

from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import Row
from specdec.tree import TokenTree

NUM_NODES, MAX_DEPTH = 14, 6


@cache
def model_of(family_name: str) -> Any:
    return FAMILIES[family_name].build()


def make_row(rng: random.Random, key: int, size: int, room: int = 100) -> Row:
    return Row(key, [rng.randrange(2, VOCAB) for _ in range(size)], size + room)


def random_tree(rng: random.Random, root: int, num_nodes: int = NUM_NODES, *, by_level: bool = False) -> TokenTree:
    """A tree of ``num_nodes`` nodes, at most MAX_DEPTH deep, whose siblings hold different tokens."""
    parents, depths, tokens = [-1], [0], [root]
    while len(parents) < num_nodes:
        first = parents[-1] if by_level else 0
        parent = rng.choice([i for i, d in enumerate(depths) if d < MAX_DEPTH and i >= first])
        taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
        parents.append(parent)
        depths.append(depths[parent] + 1)
        tokens.append(rng.choice([t for t in range(2, VOCAB) if t not in taken]))
    return TokenTree(tuple(tokens), tuple(parents))


def deep_tree(rng: random.Random, root: int) -> TokenTree:
    """Deeper than the window, with slots that differ from depths in all branches."""
    parents = (-1, 0, 0, 0, *range(3, 14), 7, *range(15, 21), 5, 0)
    return TokenTree((root, *rng.sample(range(2, VOCAB), len(parents) - 1)), parents)


def random_chain(rng: random.Random, root: int, num_nodes: int) -> TokenTree:
    return TokenTree.chain(root, [rng.randrange(2, VOCAB) for _ in range(num_nodes - 1)])


def accept(
    lm: CausalLM, rows: Sequence[Row], trees: Sequence[TokenTree], nodes: Sequence[int], rng: random.Random
) -> None:
    """Commit the path to one node of each tree and emit it with one more token, as the decode loop does."""
    lm.commit(rows, [tree.path(node) for tree, node in zip(trees, nodes, strict=True)])
    for row, tree, node in zip(rows, trees, nodes, strict=True):
        row.tokens += [*tree.path_tokens(node), rng.randrange(2, VOCAB)]


def scattered_node(tree: TokenTree) -> int:
    """The end of the longest path that is not a prefix of the nodes: its commit has to move slots."""
    paths = [tree.path(node) for node in range(len(tree))]
    return max((p for p in paths if p != list(range(len(p)))), key=len)[-1]


def generated(model: Any, row: Row) -> list[int]:
    """What transformers' own greedy search makes of a row, alone."""
    ids = torch.tensor([row.tokens])
    options = {"do_sample": False, "max_new_tokens": row.num_left, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
