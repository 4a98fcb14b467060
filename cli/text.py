"""Text for the user: lines of progress."""

from __future__ import annotations

import sys


def tell(line: str) -> None:
    """Progress for the user, apart from what a command prints."""
    print(line, file=sys.stderr, flush=True)
