"""Draft trees under a grammar: what it excludes is cut off, what it forces is grown. n nodes of one tree."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from specdec.constraints import TextGrammar
from specdec.interfaces import Limit
from specdec.tree import TokenTree, best_part

SURE = 0.98  # that the target takes a forced token: it may write the same text with others
MAX_OPTIONS = 6  # ways to go on that are worth a node each


def pruned(tree: TokenTree, grammar: TextGrammar, tokens: Sequence[int], *, drops_drawn: bool) -> TokenTree:
    """``tree`` without what cannot follow the row's ``tokens``.

    A node picked with certainty that the target gives nothing changes no verdict, and neither does what stands below
    any such node. A drawn one must be tried, because its rejection changes what its siblings are compared with; it may
    go (``drops_drawn``) where the verifier never looks at the draws.
    """
    place = {0: 0}
    excluded: set[int] = set()
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        if parent not in place or parent in excluded:
            continue
        is_allowed = _is_allowed(tree, grammar, tokens, node)
        if is_allowed or (tree.source(node) >= 0 and not drops_drawn):
            place[node] = len(place)
        if not is_allowed:
            excluded.add(node)
    return tree if len(place) == len(tree) else _part(tree, place)


def _is_allowed(tree: TokenTree, grammar: TextGrammar, tokens: Sequence[int], node: int) -> bool:
    """Whether the parent's state lets the node's token follow: its mask, at a fraction of the price where it is short."""
    above = grammar.at(tokens, tree.path_tokens(tree.parents[node]))
    sure = above.forced(1)
    if sure and sure[0] != tree.tokens[node]:
        return False
    return grammar.find(tokens, tree.path_tokens(node)) is not None


def _part(tree: TokenTree, place: dict[int, int]) -> TokenTree:
    """The nodes in ``place``, which says where each goes, in their order."""
    nodes = list(place)
    return TokenTree(
        tuple(tree.tokens[node] for node in nodes),
        tuple(place.get(tree.parents[node], -1) for node in nodes),
        tuple(tree.source(node) for node in nodes) if tree.sources else (),
        tree.draft_probs,
        tree.draws,
        tuple(tree.estimates[node] for node in nodes) if tree.estimates else (),
    )


def grown(tree: TokenTree, grammar: TextGrammar, tokens: Sequence[int], limit: Limit) -> TokenTree:
    """``tree`` and, behind its nodes, the tokens that the grammar forces there, or the few that it leaves to choose from.

    The most promising nodes stay within ``limit``, but drawn trees are kept whole: what is new gets the room they leave.
    """
    growth = _Growth(tree, limit)
    while (node := growth.next()) is not None:
        path = growth.path(node)
        state = grammar.find(tokens, path)
        if state is None or len(path) >= limit.depth:
            continue
        forced = state.forced(limit.depth - len(path))
        if forced:
            growth.hang(node, forced, SURE)
        elif growth.is_bare(node) and not limit.chain_only:
            options = state.options(MAX_OPTIONS)
            for option in options:
                growth.hang(node, [option], SURE / len(options))
    whole = growth.tree()
    return best_part(whole, whole.estimates or (1.0,) * len(whole), limit.nodes) if whole.is_certain else whole


class _Growth:
    """A tree in the making, whose most promising nodes are looked at first."""

    def __init__(self, tree: TokenTree, limit: Limit) -> None:
        self.before, self.limit = tree, limit
        self.tokens, self.parents = list(tree.tokens), list(tree.parents)
        self.estimates = list(tree.estimates) or [1.0] + [0.0] * (len(tree) - 1)
        self.places: dict[tuple[int, int], int] = {}
        for node in range(1, len(tree)):
            self.places.setdefault((tree.parents[node], tree.tokens[node]), node)
        self._waiting = [(-estimate, node) for node, estimate in enumerate(self.estimates)]
        heapq.heapify(self._waiting)
        self._seen: set[int] = set()

    def next(self) -> int | None:
        """A node to look behind; None: there is no more room."""
        while self._waiting and self._has_room:
            node = heapq.heappop(self._waiting)[1]
            if node not in self._seen:
                self._seen.add(node)
                return node
        return None

    @property
    def _has_room(self) -> bool:
        num_kept = 0 if self.before.is_certain else len(self.before) - 1  # others may give way to better ones
        return len(self.tokens) - len(self.before) < self.limit.nodes - num_kept

    def path(self, node: int) -> list[int]:
        """The tokens from the root, without its own, to ``node``."""
        tokens = []
        while node:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def is_bare(self, node: int) -> bool:
        """Whether nothing hangs below ``node``."""
        return node not in self.parents

    def hang(self, node: int, tokens: Sequence[int], sure: float) -> None:
        """A chain of ``tokens`` below ``node``, each as likely as ``sure`` behind the one before; known nodes are used."""
        for token in tokens:
            place = (node, token)
            if place not in self.places:
                if not self._has_room or (self.limit.chain_only and not self.is_bare(node)):
                    return
                self.places[place] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.estimates.append(0.0)
            above, node = self.estimates[node], self.places[place]
            self.estimates[node] = max(self.estimates[node], above * sure)
        heapq.heappush(self._waiting, (-self.estimates[node], node))

    def tree(self) -> TokenTree:
        num_new = len(self.tokens) - len(self.before)
        has_guess = bool(self.before.estimates) or len(self.before) == 1
        return TokenTree(
            tuple(self.tokens),
            tuple(self.parents),
            (*self.before.sources, *[-1] * num_new) if self.before.sources else (),
            self.before.draft_probs,
            self.before.draws,
            tuple(self.estimates) if has_guess else (),
        )
