"""Grammars of requests: compiled when they are submitted, so that whoever asks learns at once what is wrong."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from specdec.constraints import GrammarState
from specdec.errors import GrammarError
from specdec.grammar.compiler import GrammarCompiler
from specdec.grammar.inputs import Grammar

_KEPT = 8  # compilers: each has read the whole vocabulary


@dataclass(slots=True)
class Grammars:
    """Compiles grammars for one model's vocabulary and any end tokens; from any thread."""

    tokenizer: Any | None
    vocab_size: int
    _compilers: OrderedDict[tuple[int, ...], GrammarCompiler] = field(default_factory=OrderedDict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def start(self, grammar: Grammar, ends: Iterable[int]) -> GrammarState:
        """A state of an empty text, which only a token of ``ends`` can end.

        Raises:
            GrammarError: no tokenizer, no end token, or a grammar that cannot be kept to.
        """
        if self.tokenizer is None:
            raise GrammarError("a grammar needs a tokenizer: Engine(model, tokenizer=...)")
        key = tuple(sorted(ends))
        if not key:
            raise GrammarError(
                "a grammar needs a token that ends the text once it is complete; name one in stop_token_ids"
            )
        with self._lock:
            if key not in self._compilers:
                self._compilers[key] = GrammarCompiler(self.tokenizer, self.vocab_size, key)
                if len(self._compilers) > _KEPT:
                    self._compilers.popitem(last=False)
            self._compilers.move_to_end(key)
            return self._compilers[key].start(grammar)
