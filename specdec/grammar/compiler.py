"""From a grammar to the state of an empty text, for one tokenizer and one vocabulary; what was compiled is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from specdec.constraints import GrammarState
from specdec.errors import GrammarError
from specdec.grammar.inputs import Grammar

_KEPT = 64  # compiled grammars


class Backend(Protocol):
    """A library that compiles grammars."""

    def compile(self, grammar: Grammar) -> GrammarState:
        """The state of an empty text; GrammarError says what is wrong with ``grammar``."""


@dataclass(slots=True)
class GrammarCompiler:
    """Compiles grammars for one tokenizer; each is compiled once and forked for every row.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab_size: V, the columns of the logits, which may be more than the tokenizer has tokens.
        ends: the tokens that end a text: allowed where it is complete, and nowhere else.

    Raises:
        GrammarError: no end token, so that a complete text could never end.
    """

    tokenizer: Any
    vocab_size: int
    ends: tuple[int, ...]
    _backends: dict[str, Backend] = field(default_factory=dict)
    _compiled: OrderedDict[Grammar, GrammarState] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.ends = tuple(dict.fromkeys(end for end in self.ends if 0 <= end < self.vocab_size))
        if not self.ends:
            raise GrammarError(
                "a grammar needs a token that ends the text once it is complete, and the model has none; pass eos_token_id"
            )

    def start(self, grammar: Grammar) -> GrammarState:
        """A state of an empty text, for one row.

        Raises:
            GrammarError: the grammar is damaged, cannot be enforced, or allows no text in this vocabulary; or its backend is
            not installed.
        """
        if grammar not in self._compiled:
            state = self._backend(grammar.backend).compile(grammar)
            _check_start(state)
            self._compiled[grammar] = state
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].fork()

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            self._backends[name] = _backend_builders()[name](self.tokenizer, self.vocab_size, self.ends)
        return self._backends[name]


def _check_start(state: GrammarState) -> None:
    """Refuse a grammar that excludes every first token."""
    reason = ""
    try:
        can_start = bool(state.allowed().any())
    except GrammarError as error:
        can_start, reason = False, f" ({error})"
    if not can_start:
        raise GrammarError(f"the grammar allows no text at all that this tokenizer can write{reason}")


def end_tokens(eos: Any) -> tuple[int, ...]:
    """The token ids in ``eos``, as transformers' configs hold them: one, a list, a tensor or None."""
    if eos is None:
        return ()
    if isinstance(eos, Tensor):
        eos = eos.reshape(-1).tolist()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def _backend_builders() -> dict[str, Callable[[Any, int, tuple[int, ...]], Backend]]:
    def llguidance(tokenizer: Any, vocab_size: int, ends: tuple[int, ...]) -> Backend:
        _check_installed("llguidance", 'pip install "specdec-toolkit[grammar]"')
        from specdec.grammar.with_llguidance import LlguidanceBackend

        return LlguidanceBackend.of(tokenizer, vocab_size, ends)

    def xgrammar(tokenizer: Any, vocab_size: int, ends: tuple[int, ...]) -> Backend:
        _check_installed("xgrammar", "pip install xgrammar")
        from specdec.grammar.with_xgrammar import XgrammarBackend

        return XgrammarBackend.of(tokenizer, vocab_size, ends)

    return {"llguidance": llguidance, "xgrammar": xgrammar}


def _check_installed(name: str, command: str) -> None:
    try:
        import_module(name)
    except ModuleNotFoundError:
        raise GrammarError(f"grammars need {name}, which is not installed: {command}") from None
