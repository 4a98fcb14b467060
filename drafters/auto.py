"""The default drafter: what promises most for the target without training anything."""

from __future__ import annotations

from specdec.drafters import auto_drafter, build_drafter
from specdec.interfaces import DraftContext, Drafter


def build(context: DraftContext) -> Drafter:
    """Options: none of its own; those of ``model`` if there is a draft model, else of ``hybrid``."""
    return build_drafter(auto_drafter(bool(context.draft_models)), context)
