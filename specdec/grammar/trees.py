"""Draft trees under a grammar: what it excludes is cut off, what it forces is grown. n nodes of one tree."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.constraints import TextGrammar
from specdec.interfaces import Limit
from specdec.tree import TokenTree, best_part

SURE = 0.98  # that the target takes a forced token: it may write the same text with others


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
    """``tree`` and, behind each of its nodes, the tokens that the grammar forces there, within ``limit``.

    The most promising nodes stay, but drawn trees are kept whole and forced tokens get the room that is left.
    """
    grow = _Growth(tree, limit)
    for node, depth in enumerate(tree.depths()):
        state = grammar.find(tokens, tree.path_tokens(node))
        if state is not None:
            grow.chain(node, state.forced(min(limit.depth - depth, limit.nodes)))
    whole = grow.tree()
    return best_part(whole, whole.estimates or (1.0,) * len(whole), limit.nodes) if whole.is_certain else whole


class _Growth:
    """A tree in the making."""

    def __init__(self, tree: TokenTree, limit: Limit) -> None:
        self.before, self.limit = tree, limit
        self.tokens, self.parents = list(tree.tokens), list(tree.parents)
        self.estimates = list(tree.estimates) or [1.0] + [0.0] * (len(tree) - 1)
        self.places: dict[tuple[int, int], int] = {}
        for node in range(1, len(tree)):
            self.places.setdefault((tree.parents[node], tree.tokens[node]), node)

    def chain(self, node: int, forced: Sequence[int]) -> None:
        """Hang ``forced`` below ``node``; nodes that are there already are used."""
        for token in forced:
            place = (node, token)
            if place not in self.places:
                if not self._has_room(node):
                    return
                self.places[place] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.estimates.append(0.0)
            above, node = self.estimates[node], self.places[place]
            self.estimates[node] = max(self.estimates[node], above * SURE)

    def _has_room(self, node: int) -> bool:
        if self.limit.chain_only and node in self.parents:
            return False
        return self.before.is_certain or len(self.tokens) <= self.limit.nodes

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
