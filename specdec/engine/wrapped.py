"""The transformers model inside whatever is handed over as one: an adapter, a compiled or a parallel module around it.

The wrapper is what runs, because it may change what a pass computes; all else is asked of the model inside.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from specdec.errors import UnsupportedModelError


def model_inside(module: Any) -> Any:
    """``module`` if it is a transformers model, else the outermost one that it wraps.

    Raises:
        UnsupportedModelError: there is none.
    """
    inside = module.modules() if isinstance(module, nn.Module) else ()
    found = next((each for each in inside if isinstance(each, PreTrainedModel)), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is no transformers model and wraps none; load one with "
            "AutoModelForCausalLM.from_pretrained or specdec.load_model"
        )
    return found


def what_runs(model: Any) -> Any:
    """What generate() runs when it calls back with ``model``: itself, or the wrapper that prepares its inputs.

    Adapters that add virtual tokens let the model inside generate and change the inputs of each pass on their way.
    """
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    return owner if isinstance(owner, nn.Module) else model


def takes(module: Any, argument: str) -> bool:
    """Whether ``module`` can be called with ``argument``; one that takes any hands it to the model inside."""
    parameters = inspect.signature(module.forward).parameters
    if argument in parameters:
        return True
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return takes_any and argument in inspect.signature(type(model_inside(module)).forward).parameters


def described(module: Any) -> str:
    """A model in words: its class, and where it was loaded from if it says so."""
    place = getattr(model_inside(module).config, "name_or_path", "")
    return f"{type(module).__name__} {place!r}" if place else type(module).__name__
