"""Every limit of the server, once: what it is by default and what it is there for."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask for, and how long it may take.

    Raises:
        ValueError: a limit that would refuse everything.
    """

    max_prompt_tokens: int | None = None  # None: what the model and its cache hold
    max_new_tokens: int | None = None  # None: what is left, or 4096 where the model has no end
    max_choices: int = 16  # texts of one request: prompts times n
    max_body_bytes: int = 4 << 20
    max_starting: int = 256  # requests that are being tokenized, before the engine counts them as waiting
    max_connections: int = 1024
    body_timeout_s: float = 30.0  # for a body to arrive
    request_timeout_s: float = 600.0  # for an answer to be complete
    stall_timeout_s: float = 30.0  # for a reader to take what was sent
    grace_s: float = 30.0  # for running answers to finish when the server is told to stop

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "grace_s" else 1 if field.name.startswith("max_") else 1e-3
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{field.name} must be at least {least:g}, got {value}")


UNBOUNDED_NEW_TOKENS = 4096  # for a model whose context has no end and a server without a limit
