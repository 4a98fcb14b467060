"""What can go wrong with a kernel, apart from wrong arguments."""

from __future__ import annotations


class KernelUnavailableError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why and what to do."""


class KernelFaultError(RuntimeError):
    """The simulator found a kernel doing what no kernel may: a deadlock, a lost copy, a store outside its output."""
