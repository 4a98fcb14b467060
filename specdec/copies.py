"""Copies of a model in which some modules are replaced, made once and kept for as long as the model lives.

A copy consists of views (``specdec.module_views``): whatever is set on the model later, on a module or a config, holds
for its copies too. What a copy does hold itself is watched: which modules there are, the weights that were laid out
anew (``specdec.weight_watch``), hooks on what was replaced, and the attention.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from specdec.capture import is_hook_of_ours
from specdec.module_views import View, own_attributes, view_of
from specdec.weight_watch import WeightWatch

_ATTENTION = "_attn_implementation_internal"  # where a config of transformers keeps its attention


def sharing_copy(model: Any) -> Any:
    """A copy of ``model`` whose submodules may be replaced and whose attention may be set; all else is shared.

    Modules without submodules and configs are those of ``model`` itself. So are modules with a forward of their own
    (set on the object, or compiled), with all below: it would go on to run the modules of ``model``. If that is true
    of ``model`` itself, it is returned.
    """
    return _module_view(model, {})


def has_own_forward(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs another function than the forward of its class."""
    return "forward" in vars(module) or module._compiled_call_impl is not None


def is_changed(module: nn.Module) -> bool:
    """Whether a call of ``module`` is more than the forward of its class: hooks, or a forward of its own."""
    return has_own_forward(module) or any(
        hooks and not all(map(is_hook_of_ours, list(hooks.values())))
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    )


def replaceable(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model`` whose submodules may be replaced: if it is a copy, those that it does not share."""
    return (module for module in model.modules() if isinstance(module, View) or not isinstance(model, View))


def shares_attention(model: nn.Module) -> bool:
    """Whether setting the attention of a copy would set that of the model."""
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return isinstance(model, View) and not all(isinstance(part, View) for part in parts)


def _module_view(module: Any, known: dict[int, Any]) -> Any:
    if id(module) in known:
        return known[id(module)]
    own = _config_views(module, known)
    is_plain = type(vars(module).get("_modules")) is dict and not has_own_forward(module)
    if not is_plain or not (module._modules or own):
        return module
    children: dict[str, Any] = {}
    view = known[id(module)] = view_of(module, {**own, "_modules": children})
    for name, child in module._modules.items():
        children[name] = None if child is None else _module_view(child, known)
    return view


def _config_views(owner: Any, known: dict[int, Any]) -> dict[str, Any]:
    """The attributes that a view of ``owner`` has of its own; of its configs there are views."""
    own = own_attributes(owner) if isinstance(owner, View) else {}
    for name, value in list({**vars(owner), **own}.items()):
        if not isinstance(value, PreTrainedConfig):
            continue
        if id(value) not in known:
            attention = {_ATTENTION: getattr(value, _ATTENTION, None)}
            known[id(value)] = view_of(value, {**attention, **_config_views(value, known)})
        own[name] = known[id(value)]
    return own


class ModuleWatch:
    """The modules below a model, their configs and hooks, and whether all these are still what they were."""

    def __init__(self, model: nn.Module) -> None:
        members = (member for module in model.modules() for member in vars(module).items())
        names = (name for name, value in members if isinstance(value, PreTrainedConfig))
        self._config_names = tuple(dict.fromkeys(("config", *names)))
        self._facts, objects = self._read(model)
        self._objects = [ref(each) for each in objects]

    def is_unchanged(self, model: nn.Module) -> bool:
        facts, objects = self._read(model)
        # Compared as objects too: what is gone may have left its id to another.
        return facts == self._facts and all(known() is each for known, each in zip(self._objects, objects, strict=True))

    def _read(self, model: nn.Module) -> tuple[list[Any], list[Any]]:
        """What must be equal, and what must be the same objects."""
        facts: list[Any] = []
        objects: list[Any] = []
        seen: set[int] = set()
        waiting: list[Any] = [model]
        while waiting:
            each = waiting.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            if isinstance(each, nn.Module):
                objects.append(each)
                children, members = each._modules, vars(each)
                facts.append((type(each), type(each).forward, is_changed(each), *children, *map(id, children.values())))
                waiting += [child for child in children.values() if child is not None]
                waiting += [members[name] for name in self._config_names if name in members]
            elif isinstance(each, PreTrainedConfig):
                objects.append(each)
                nested = [value for value in list(vars(each).values()) if isinstance(value, PreTrainedConfig)]
                facts.append((getattr(each, _ATTENTION, None), *map(id, nested)))
                waiting += nested
        return facts, objects


@dataclass(frozen=True, slots=True)
class _Kept:
    modules: ModuleWatch
    weights: WeightWatch
    copy: Any


Copies = WeakKeyDictionary[Any, _Kept]
_MAKING = threading.RLock()  # two threads must not both make the copy that one of them throws away


def kept_copy(
    copies: Copies, model: Any, make: Callable[[Any], Any], laid_out: Callable[[Any], Sequence[nn.Module]] = lambda _: ()
) -> Any:
    """``make(model)`` as kept in ``copies``, made anew when what it does not share with ``model`` has changed.

    ``laid_out`` names the layers of ``model`` whose weights the copy holds in another form. A copy that is out of date
    is let go before the next one is made.
    """
    with _MAKING:
        kept = copies.get(model)
        if kept is not None:
            if kept.modules.is_unchanged(model) and kept.weights.is_unchanged():
                return kept.copy
            del copies[model], kept
        watches = ModuleWatch(model), WeightWatch(laid_out(model))
        ours = make(model)
        if ours is not model:  # an entry that held its own key would never go
            copies[model] = _Kept(*watches, ours)
        return ours
