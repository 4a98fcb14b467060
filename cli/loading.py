"""Models, tokenizers and what a run must know of them, for the commands that generate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.cli.options import Engine
from specdec.cli.saved import end_ids
from specdec.cli.text import tell
from specdec.engine.causal_lm import CausalLM
from specdec.errors import ModelUnavailableError, UnsupportedModelError
from specdec.hub.catalog import is_fetched, known_models, model_path
from specdec.hub.load import load_model, load_tokenizer
from specdec.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Loaded:
    """A target, ready to decode."""

    model: Any  # as transformers runs it
    runtime: Runtime  # as we run it: on a CPU with packed layers, unless that was declined
    tokenizer: Any
    draft_models: tuple[Any, ...]  # as transformers runs them

    @property
    def target(self) -> CausalLM:
        return self.runtime.target

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def load(target: str, draft_models: Sequence[str], engine: Engine, *, compare: bool = False) -> Loaded:
    """Load what is named; a built-in model that is not here yet is fetched.

    With ``compare`` transformers is to run the models as well, which keeps a second copy of what is accelerated.

    Raises:
        ModelUnavailableError, UnsupportedModelError, ValueError: in words that say what to do.
    """
    model = load_model(target, dtype=engine.dtype, device=engine.device, progress=tell)
    tokenizer = load_tokenizer(target, progress=tell)
    for name in draft_models:
        check_tokenizers(tokenizer, name)
    drafts = tuple(load_model(name, dtype=engine.dtype, device=engine.device, progress=tell) for name in draft_models)
    runtime = Runtime(model, drafts, accelerate=engine.accelerate, cuda_graphs=engine.cuda_graphs, in_place=not compare)
    return Loaded(model, runtime, tokenizer, drafts)


def check_tokenizers(tokenizer: Any, draft_model: str) -> None:
    """Refuse a draft model that means other tokens by the same ids; one without a tokenizer is taken at its word.

    Raises:
        UnsupportedModelError: fewer than 99 of 100 token ids agree.
    """
    try:
        other = load_tokenizer(draft_model, progress=tell)
    except (ModelUnavailableError, ValueError):
        return
    target_ids, draft_ids = tokenizer.get_vocab(), other.get_vocab()
    agree = sum(draft_ids.get(token) == number for token, number in target_ids.items())
    if agree < 0.99 * len(target_ids):
        raise UnsupportedModelError(
            f"the tokenizer of draft model {draft_model!r} gives the target's ids to {agree} of {len(target_ids)} tokens: they do "
            "not share a vocabulary; use a draft model of the same family, or a drafter without a model such as 'ngram'"
        )


def eos_ids(model: Any) -> frozenset[int]:
    """The token ids that end a text: those of the model's generation config, as in generate()."""
    return end_ids(model.generation_config)


def check_prompt(engine: CausalLM, ids: list[int], max_new_tokens: int, what: str) -> None:
    """Refuse a prompt that the model has no room or no tokens for; ``what`` names it.

    Raises:
        ValueError: empty, too long with its new tokens, or ids outside the vocabulary.
    """
    if not ids:
        raise ValueError(f"{what} is empty: it has no tokens; write some text")
    if min(ids) < 0 or max(ids) >= engine.vocab_size:
        raise ValueError(
            f"{what} has token ids up to {max(ids)}, but the model knows {engine.vocab_size}: the tokenizer does not belong to it"
        )
    limit = engine.context_length
    if limit is not None and len(ids) + max_new_tokens > limit:
        room = max(limit - len(ids), 0)
        raise ValueError(
            f"{what} needs {len(ids)} tokens and {max_new_tokens} new ones, which is past the model's context of {limit}; "
            + (f"ask for at most {room} new tokens or shorten it" if room else "shorten it")
        )


def all_model_facts(target: str, draft_models: Sequence[str]) -> dict[str, Any]:
    """What provenance says of the models of a run."""
    drafts = {"drafter" if i == 0 else f"drafter {i + 1}": model_facts(name) for i, name in enumerate(draft_models)}
    return {"target": model_facts(target), **drafts}


def model_facts(name: str) -> dict[str, Any]:
    """What provenance says of a model: its id, and for a built-in one where its weights come from."""
    facts: dict[str, Any] = {"id": name}
    if name in [builtin.name for builtin in known_models()] and is_fetched(name):
        source = json.loads((model_path(name) / "specdec_source.json").read_text("utf-8"))
        facts |= {key: source[key] for key in ("source", "sha256", "member", "conversion_version")}
    return facts
