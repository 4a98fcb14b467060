"""Checks of single values that callers hand over, and how an error shows them."""

from __future__ import annotations

import operator
from typing import Any


def shown(value: Any) -> str:
    """``value`` as in code if that is short, else its type."""
    text = repr(value)
    is_short = len(text) <= 60 and "\n" not in text and " at 0x" not in text
    return text if is_short else f"an object of type {type(value).__name__}"


def whole_number(name: str, value: Any) -> int:
    """``value`` as an int if it is one, of NumPy's or torch's kind too.

    Raises:
        ValueError: it is something else, True and False included.
    """
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {shown(value)}") from None
