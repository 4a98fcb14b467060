"""Verification rules: every file of this folder is one. The facts behind them are in docs/verification.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

from specdec.interfaces import Verifier


def _build(name: str) -> Verifier:
    verifier: Verifier = import_module(f"{__name__}.{name}").build()
    return verifier


VERIFIERS: dict[str, Callable[[], Verifier]] = {
    module.name: partial(_build, module.name) for module in iter_modules(__path__) if not module.ispkg
}


def make_verifier(name: str) -> Verifier:
    """The verifier called ``name``.

    Raises:
        ValueError: no such verifier.
    """
    if name not in VERIFIERS:
        raise ValueError(f"no verifier is called {name!r}; choose one of {', '.join(VERIFIERS)}")
    return VERIFIERS[name]()
