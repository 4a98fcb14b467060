"""Errors of ours that a caller may want to tell apart. Everything a caller can fix is a ValueError."""


class SpecdecError(Exception):
    """Base class of this package's own errors."""


class UnsupportedModelError(SpecdecError, ValueError):
    """The model cannot be used as asked; the message says why and what can be done instead."""


class UnsupportedOptionError(SpecdecError, ValueError):
    """A ``generate()`` option that this package does not support; the message names it."""


class NonFiniteLogitsError(SpecdecError, ValueError):
    """The model returned NaN or +inf logits, or excluded every token, at a position that has to be decided."""


class GrammarError(SpecdecError, ValueError):
    """A grammar that cannot be kept to: damaged, impossible, beyond what its backend enforces, or beyond its limits."""


class InexactDraftError(SpecdecError, ValueError):
    """A verifier was handed a tree whose draws or branches it is not exact for."""


class ModelUnavailableError(SpecdecError, OSError):
    """A model could not be found, fetched or read."""


class CheckpointError(SpecdecError, ValueError):
    """A drafter's checkpoint is damaged or does not hold what its format says; the message names the key."""


class OutOfBlocksError(SpecdecError, MemoryError):
    """The paged key-value cache has no room; who schedules rows waits, drafts less or preempts one."""
