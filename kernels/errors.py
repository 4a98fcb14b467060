"""What can go wrong with a kernel, apart from wrong arguments."""

from __future__ import annotations


class KernelUnavailableError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why and what to do."""
