"""What transformers' hook ``custom_generate`` leaves behind, carried around it.

``generate()`` prepares everything and calls the hook, but hands a function there neither the streamer nor the
tokenizer, an assistant model or ``synced_gpus``. What needs the tokenizer (stop strings, token healing) is therefore
done beside it, with the precedence of ``generate()``: keyword, then the caller's ``generation_config``, then the model's.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerationMixin

from specdec.errors import UnsupportedOptionError

_GENERATE: Any = inspect.unwrap(GenerationMixin.generate)


@dataclass(frozen=True, slots=True)
class Dropped:
    """Arguments of ``generate()`` that it does not hand on to the hook."""

    streamer: Any = None
    assistant_model: Any = None
    synced_gpus: Any = None


def dropped_arguments(model: Any) -> Dropped:
    """Those of the call of ``model.generate`` that called the hook; None each where there was no such call.

    They exist nowhere but in that call's own frame. A streamer that was not found there would get no token and no
    end, and whoever reads from it would wait for ever.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _GENERATE.__code__ and frame.f_locals["self"] is model:
            return Dropped(*(frame.f_locals.get(name) for name in Dropped.__slots__))
        frame = frame.f_back
    return Dropped()


def check_dropped(dropped: Dropped) -> None:
    """Refuse what the loop cannot honour.

    Raises:
        UnsupportedOptionError: names the argument.
    """
    if dropped.assistant_model is not None:
        raise UnsupportedOptionError(
            "pass the draft model as draft_model= with drafter='model' instead of assistant_model="
        )
    if dropped.synced_gpus:
        raise UnsupportedOptionError(
            "synced_gpus=True is not supported: rows here end at different passes; leave it out, or call model.generate"
        )


@dataclass(slots=True)
class Call:
    """The arguments of one call of ``generate()``: ids, config and keywords, which may be changed for the hook."""

    model: Any
    inputs: Tensor | None
    config: Any | None  # the caller's own
    kwargs: dict[str, Any]

    def setting(self, name: str) -> Any:
        """What ``generate()`` takes for ``name``: a keyword, even None, before the configs, of which None says nothing."""
        if name in self.kwargs:
            return self.kwargs[name]
        own = getattr(self.config, name, None)
        return getattr(self.model.generation_config, name, None) if own is None else own

    def set(self, name: str, value: Any) -> None:
        """Make ``value`` what ``generate()`` takes for ``name``."""
        fills_in = value is None and getattr(self.model.generation_config, name, None) is not None
        if self.config is None or fills_in or name in self.kwargs:
            self.kwargs[name] = value
        else:  # keywords beside a config are deprecated, and a warning would accuse the caller
            self.config = copy.deepcopy(self.config)
            setattr(self.config, name, value)

    def run(self, loop: Any) -> Any:
        """``model.generate`` with ``loop`` in its hook."""
        config = {} if self.config is None else {"generation_config": self.config}
        return self.model.generate(self.inputs, custom_generate=loop, **config, **self.kwargs)


def take_stop_strings(call: Call, tokenizer: Any) -> None:
    """Make the call's stop strings, if there are any, a stopping criterion.

    Raises:
        ValueError: there is no tokenizer.
    """
    strings = call.setting("stop_strings")
    if strings is None:
        return
    _check_tokenizer(tokenizer, "stop_strings")
    criteria = StoppingCriteriaList(call.kwargs.get("stopping_criteria") or ())
    if not any(type(each) is StopStringCriteria for each in criteria):  # generate() prefers the caller's own
        criteria.insert(0, StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    call.kwargs["stopping_criteria"] = criteria
    call.set("stop_strings", None)


def heal_tokens(call: Call, tokenizer: Any) -> None:
    """Replace the last token of each prompt by what may continue it, if the call asks for ``token_healing``.

    ``generate()`` heals the ids that it has prepared and keeps the mask of those before, so it is asked for both.

    Raises:
        ValueError: there is no tokenizer.
        UnsupportedOptionError: the model's own config asks for healing, which transformers cannot do either.
    """
    if not call.setting("token_healing"):
        return
    _check_tokenizer(tokenizer, "token_healing")
    if call.model.generation_config.token_healing:
        raise UnsupportedOptionError(
            "token_healing must not be set in model.generation_config: to heal, transformers calls generate() without "
            "a tokenizer, which would heal again; unset it there, and pass token_healing=True"
        )
    call.set("token_healing", False)
    ids, mask = _prepared(call)
    healed: Tensor = call.model.heal_tokens(ids, tokenizer)
    width = healed.shape[1]
    # Healing strips spaces; as in generate(), a narrower batch keeps the mask's first columns.
    call.kwargs["attention_mask"] = torch.ones_like(healed) if mask is None else mask[:, :width]
    call.kwargs.pop("input_ids", None)
    call.inputs = healed
    if call.setting("num_return_sequences") not in (None, 1):
        call.set("num_return_sequences", 1)  # the prepared ids hold each prompt as often already


def _prepared(call: Call) -> tuple[Tensor, Tensor | None]:
    """The ids and mask (None: all ones) that ``generate()`` hands to its hook."""
    found: list[tuple[Tensor, Tensor | None]] = []

    def take(self: Any, input_ids: Tensor, **model_kwargs: Any) -> Tensor:
        found.append((input_ids, model_kwargs.get("attention_mask")))
        return input_ids

    call.run(take)
    return found[0]


def _check_tokenizer(tokenizer: Any, option: str) -> None:
    if tokenizer is None:
        raise ValueError(f"for {option} pass the tokenizer: tokenizer=..., as for model.generate")
    if not callable(tokenizer) or not callable(getattr(tokenizer, "get_vocab", None)):
        raise ValueError(f"for {option} tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}")
