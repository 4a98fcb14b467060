"""Progress on standard error: a bar on a terminal, otherwise a line now and then. Nothing runs while a method does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_S = 10.0

Tell = Callable[[int, int, str], None]  # runs done, runs in all, what comes next


@contextmanager
def progress() -> Iterator[Tell]:
    """A function to call before each run."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refreshing thread: it would take time from what is measured.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what, refresh=True)

        yield show


def _lines() -> Tell:
    started = time.monotonic()
    last = -_LINE_EVERY_S

    def show(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic() - started
        if now - last >= _LINE_EVERY_S:
            last = now
            left = f", about {now / done * (total - done):.0f} s left" if done else ""
            print(f"{done} of {total} runs{left}: {what}", file=sys.stderr, flush=True)

    return show
