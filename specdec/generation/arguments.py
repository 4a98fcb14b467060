"""What callers hand to ``generate()``: anything of another kind is refused in a sentence before a model runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from specdec.checks import shown
from specdec.engine.probe import inspect_model
from specdec.errors import UnsupportedOptionError
from specdec.interfaces import Drafter, Verifier
from specdec.verifiers import make_verifier

DEFAULT_CACHES = (None, "dynamic", "hybrid")  # "hybrid" is what old checkpoints call the default of today


def unsupported(name: str, value: Any) -> UnsupportedOptionError:
    """The error that option ``name`` cannot be ``value``."""
    return UnsupportedOptionError(
        f"{name}={value!r} is not supported by speculative generation; leave it out, or call model.generate"
    )


def check_model(model: Any, name: str = "model") -> None:
    """Refuse what is no loaded language model.

    Raises:
        ValueError: it is a name, a path or something else.
    """
    if isinstance(model, str | os.PathLike):
        raise ValueError(
            f"{name} must be a loaded model, got the name {os.fspath(model)!r}: load it with "
            "specdec.load_model(...) or AutoModelForCausalLM.from_pretrained(...)"
        )
    if not (isinstance(model, nn.Module) and any(isinstance(part, PreTrainedModel) for part in model.modules())):
        raise ValueError(f"{name} must be a loaded causal language model of transformers, got {shown(model)}")


class DraftModels(Sequence[Any]):
    """The caller's draft models, which remember whether the drafter asked for them."""

    def __init__(self, models: Sequence[Any]) -> None:
        self._models = tuple(models)
        self.were_asked_for = False

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        self.were_asked_for = True
        return self._models[index]

    def __len__(self) -> int:
        self.were_asked_for = True
        return len(self._models)

    def check_use(self, drafter: str) -> None:
        """Refuse models that ``drafter``, which was built with them, does not run.

        Raises:
            ValueError: there are some, and nobody asked for them.
        """
        if self._models and not self.were_asked_for:
            raise ValueError(
                f"drafter {drafter!r} runs no draft model, but one was given as draft_model; leave it out, or name a "
                "drafter that does, such as 'model'"
            )


def as_models(given: Any) -> Sequence[Any]:
    """The draft models in ``given``: one, a list or tuple of them, or None.

    Raises:
        ValueError: something in it is no loaded model.
    """
    if given is None:
        return ()
    models = given if isinstance(given, list | tuple) else (given,)
    for model in models:
        check_model(model, "draft_model")
    return models


def drafter_of(given: Any) -> str | Path | Drafter:
    """``given`` as a name, the path of a tuned file, or the drafter that it is.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, os.PathLike):
        return Path(os.fspath(given))
    promises = ("name", "begin", "propose", "observe", "end")  # a hybrid asks for the traits, too
    if isinstance(given, type) or not all(hasattr(given, promise) for promise in promises):
        raise ValueError(
            f"drafter must be a name such as 'ngram', a tuned file or a Drafter object, got {shown(given)}; for plain "
            "decoding name the drafter 'none'"
        )
    drafter: Drafter = given
    return drafter


def verifier_of(given: Any) -> Verifier:
    """The verifier that ``given`` names or is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(given, str):
        return make_verifier(given)
    if isinstance(given, type) or not isinstance(given, Verifier):
        raise ValueError(f"verifier must be a name such as 'match' or a Verifier object, got {shown(given)}")
    return given


def check_callable(name: str, given: Any) -> None:
    """Refuse what can be neither called nor left out.

    Raises:
        ValueError: it is neither None nor a function.
    """
    if given is not None and not callable(given):
        raise ValueError(f"{name} must be a function or None, got {shown(given)}")


def check_functions(name: str, given: Any) -> None:
    """Refuse what is no list of processors or criteria.

    Raises:
        ValueError: a single one, or a list with something else in it.
    """
    if given is None:
        return
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name} must be a list, got {shown(given)}: put a single one into a list")
    for each in given:
        if not callable(each):
            raise ValueError(f"{name} must hold functions of (input_ids, scores), got {shown(each)}")


def check_input_ids(name: str, ids: Any) -> None:
    """Refuse what is no batch of token ids.

    Raises:
        ValueError: another type, shape or dtype than a tensor (B, L) of whole numbers, or no token at all.
    """
    if not isinstance(ids, Tensor):
        way = "pass its entries as keywords, generate(model, **inputs)" if hasattr(ids, "keys") else "use torch.tensor"
        raise ValueError(f"{name} must be a tensor of token ids (batch, length), got {type(ids).__name__}: {way}")
    if ids.dim() != 2 or ids.numel() == 0:
        way = f"; a single prompt is {name}[None]" if ids.dim() == 1 else ""
        raise ValueError(f"{name} must be (batch, length) with at least one token, got shape {tuple(ids.shape)}{way}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold token ids, which are whole numbers, got {ids.dtype}; use {name}.long()")


def check_mask(mask: Any, ids: Tensor) -> None:
    """Refuse an attention mask that is not one for ``ids`` (B, L).

    Raises:
        ValueError: another type or shape, or other values than 0 and 1.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor (batch, length), got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of the token ids, {tuple(ids.shape)}, got {tuple(mask.shape)}; "
            "take both from one call of the tokenizer"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"attention_mask must be 1 for tokens and 0 for padding, got values such as {_odd(mask)}")


def _odd(mask: Tensor) -> float:
    return float(mask[(mask != 0) & (mask != 1)][0])


def check_cache(past: Any) -> None:
    """Refuse a cache of the caller's that speculation would not use as asked.

    Raises:
        ValueError: it is no cache.
        UnsupportedOptionError: it holds something, or is another cache than the default.
    """
    if not isinstance(past, Cache):
        raise ValueError(f"past_key_values must be a Cache of transformers, got {type(past).__name__}; leave it out")
    if type(past) is not DynamicCache or getattr(past, "offloading", False):
        raise UnsupportedOptionError(
            f"past_key_values of another kind than a plain DynamicCache are not supported, got {type(past).__name__}: "
            "the loop keeps its own cache; leave it out"
        )
    if past.get_seq_length() > 0:
        raise UnsupportedOptionError(
            "past_key_values that hold tokens are not supported: the loop keeps its own cache; pass the whole prompt"
        )


def check_call(model: Any, inputs: Any, config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what ``model.generate`` would stumble over, or would not hand on.

    Raises:
        ValueError: an argument of another kind than it must be.
        UnsupportedOptionError: an option that is not supported here.
        UnsupportedModelError: no causal language model.
    """
    check_model(model)
    inspect_model(model)
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig, got {shown(config)}; pass options as keywords")
    if "custom_generate" in kwargs:
        raise ValueError("custom_generate cannot be given: specdec.generate is one; call model.generate")
    if kwargs.get("assistant_tokenizer") is not None:
        raise UnsupportedOptionError(
            "assistant_tokenizer: a draft model must share the target's vocabulary; leave it out"
        )
    cache = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    if cache not in DEFAULT_CACHES:  # generate() would build it first, or run another loop
        raise unsupported("cache_implementation", cache)
    for name in ("logits_processor", "stopping_criteria"):
        check_functions(name, kwargs.get(name))
    given = {"inputs": inputs, "input_ids": kwargs.get("input_ids")}
    for name, ids in given.items():
        if ids is not None:
            check_input_ids(name, ids)
            if kwargs.get("attention_mask") is not None:
                check_mask(kwargs["attention_mask"], ids)
    if kwargs.get("past_key_values") is not None:
        check_cache(kwargs["past_key_values"])
