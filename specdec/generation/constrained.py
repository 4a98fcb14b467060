"""Grammars in ``generate()``: compiled before a model runs, masked where a processor of the caller's would be asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from specdec.checks import shown
from specdec.drafters.grammar import GrammarDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.model_state import ModelState
from specdec.engine.wrapped import what_runs
from specdec.generation.hook import Call
from specdec.grammar.compiler import GrammarCompiler, end_tokens
from specdec.grammar.inputs import Grammar
from specdec.grammar.masks import GrammarProcessor
from specdec.interfaces import Drafter, Row, Verifier

Grammars = Grammar | Sequence[Grammar | None]


def constrain(call: Call, grammar: Grammars, tokenizer: Any) -> None:
    """Add the mask of ``grammar`` to the call, behind all processors that it has.

    Raises:
        ValueError: no tokenizer, or something that is no grammar.
        GrammarError: a grammar that cannot be kept to.
    """
    grammars = _checked(grammar)
    if tokenizer is None:
        raise ValueError("for grammar pass the tokenizer: tokenizer=...")
    compiler = model_compiler(call.model, tokenizer, end_tokens(call.setting("eos_token_id")))
    states = [None if each is None else compiler.start(each) for each in grammars]
    call.kwargs["logits_processor"] = [
        *(call.kwargs.get("logits_processor") or ()),
        GrammarProcessor(states, compiler.ends),
    ]


def model_compiler(model: Any, tokenizer: Any, ends: tuple[int, ...]) -> GrammarCompiler:
    """The compiler of ``model`` and ``tokenizer``, kept with what it compiled for as long as the model lives."""
    head = model.get_output_embeddings()
    vocab_size = int(head.out_features if hasattr(head, "out_features") else head.weight.shape[0])
    kept = ModelState.of(what_runs(model)).keep(
        ("grammars", id(tokenizer), ends), partial(GrammarCompiler, tokenizer, vocab_size, ends)
    )
    # The compiler holds its tokenizer, so that no other one can have got the same id.
    assert kept.tokenizer is tokenizer
    return kept


def attach_grammars(processors: Sequence[Any], rows: Sequence[Row]) -> None:
    """Give ``rows`` the grammars that stand among ``processors``."""
    for processor in processors:
        if isinstance(processor, GrammarProcessor):
            processor.attach(rows)


def guided(drafter: Drafter, verifier: Verifier, *, is_growing: bool) -> Drafter:
    """``drafter`` for rows with grammars: what these exclude is not verified, and what they force is drafted, too."""
    if isinstance(drafter, GrammarDrafter | NoDrafter):
        return drafter
    return GrammarDrafter(drafter, verifier.shares_target_noise, is_growing, name=drafter.name)


def _checked(grammar: Any) -> Sequence[Grammar | None]:
    """One grammar, or one for each row."""
    grammars = [grammar] if isinstance(grammar, Grammar) else grammar
    if not isinstance(grammars, list | tuple) or not grammars:
        raise ValueError(f"grammar must be a specdec.Grammar or a list of them, got {shown(grammar)}")
    for each in grammars:
        if each is not None and not isinstance(each, Grammar):
            raise ValueError(f"grammar must hold specdec.Grammar objects and None, got {shown(each)}")
    return grammars
