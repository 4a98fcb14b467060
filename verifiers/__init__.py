"""Verification rules, and the table of their names. The facts behind them are in docs/verification.md."""

from __future__ import annotations

from collections.abc import Callable

from specdec.interfaces import Verifier
from specdec.verifiers.block import BlockVerifier
from specdec.verifiers.match import MatchVerifier
from specdec.verifiers.rejection import RejectionVerifier
from specdec.verifiers.traversal import TraversalVerifier
from specdec.verifiers.typical import TypicalVerifier

VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "match": MatchVerifier,
    "rejection": RejectionVerifier,
    "block": BlockVerifier,
    "traversal": TraversalVerifier,
    "typical": TypicalVerifier,
}


def make_verifier(name: str) -> Verifier:
    """The verifier called ``name``.

    Raises:
        ValueError: no such verifier.
    """
    if name not in VERIFIERS:
        raise ValueError(f"no verifier is called {name!r}; choose one of {', '.join(VERIFIERS)}")
    return VERIFIERS[name]()
