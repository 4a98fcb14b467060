"""What all verifiers share: the check of a tree's draws, and the walk that a deterministic target leaves no choice in."""

from __future__ import annotations

from collections.abc import Callable

from specdec.errors import InexactDraftError
from specdec.interfaces import Verdict, Verifier
from specdec.tree import TokenTree


def check_draws(verifier: Verifier, tree: TokenTree) -> None:
    """Refuse a tree whose draws the verifier is not exact for.

    Raises:
        InexactDraftError: it would emit another distribution than the target's.
    """
    if not tree.drawn <= verifier.draws:
        exact = ", ".join(sorted(verifier.draws)) or "with certainty only"
        raise InexactDraftError(
            f"verifier {verifier.name!r} is exact for nodes drawn {exact}, got some drawn "
            f"{', '.join(sorted(tree.drawn - verifier.draws))}; use verifier 'match', which is exact for any tree"
        )


def follow(tree: TokenTree, pick: Callable[[int, int], int]) -> Verdict:
    """Sample-and-match: from the root down, ``pick(node, depth)`` the next token and move to the child that holds it.

    Every token is the target's own pick; the tree only decides how many of them one pass yields.
    """
    children = tree.children()
    nodes, tokens = [0], list[int]()
    while True:
        token = pick(nodes[-1], len(tokens))
        tokens.append(token)
        child = next((c for c in children[nodes[-1]] if tree.tokens[c] == token), None)
        if child is None:
            return Verdict(tuple(nodes), tuple(tokens))
        nodes.append(child)
