"""Freeing what several owners hold: an error of one must not keep the others from being asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def call_all(calls: Iterable[Callable[[], object]], during: BaseException | None = None) -> None:
    """Make every call, whatever the others raise, and then raise the first error; later ones become notes of it.

    Args:
        calls: in this order.
        during: the error that is being handled, if there is one. The caller raises it, and here nothing is raised.
    """
    first = during
    for call in calls:
        try:
            call()
        except BaseException as error:
            if first is None:
                first = error
            else:
                first.add_note(f"while rows were released after it: {type(error).__name__}: {error}")
    if first is not None and during is None:
        raise first
