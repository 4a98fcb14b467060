"""specdec: exact, general and fast speculative decoding for any Hugging Face causal LM.

Names are loaded when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.generation.batch import SpeculativeOutput
    from specdec.generation.prefix_cache import PrefixCache
    from specdec.generation.wrapper import custom_generate, generate
    from specdec.grammar.inputs import Grammar
    from specdec.hub.load import load_model, load_tokenizer
    from specdec.serving.engine import Engine
    from specdec.serving.request import RequestSettings
    from specdec.stats import Stats
    from specdec.tree import Draw, TokenTree

__version__ = "0.1.0"

_HOMES = {
    "generate": "specdec.generation.wrapper",
    "custom_generate": "specdec.generation.wrapper",
    "SpeculativeOutput": "specdec.generation.batch",
    "Grammar": "specdec.grammar.inputs",
    "Engine": "specdec.serving.engine",
    "PrefixCache": "specdec.generation.prefix_cache",
    "RequestSettings": "specdec.serving.request",
    "Stats": "specdec.stats",
    "load_model": "specdec.hub.load",
    "load_tokenizer": "specdec.hub.load",
    "Draw": "specdec.tree",
    "TokenTree": "specdec.tree",
}

__all__ = [
    "Draw",
    "Engine",
    "Grammar",
    "PrefixCache",
    "RequestSettings",
    "SpeculativeOutput",
    "Stats",
    "TokenTree",
    "custom_generate",
    "generate",
    "load_model",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
