"""Copies of a model in which some modules are replaced, made once and kept for as long as the model lives.

A copy consists of views (``specdec.engine.module_views``): whatever is set on the model later, on a module or a config, holds
for its copies too. What a copy does hold itself is watched: which modules there are, the weights that were laid out
anew (``specdec.engine.weight_watch``), hooks on what was replaced, and the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from specdec.engine.hidden_states import is_hook_of_ours
from specdec.engine.model_state import ModelState
from specdec.engine.module_views import View, own_attributes, view_of
from specdec.engine.weight_watch import WeightWatch

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
    return has_own_forward(module) or _are_foreign(module._forward_hooks) or _are_foreign(module._forward_pre_hooks)


def _are_foreign(hooks: dict[int, Any]) -> bool:
    return bool(hooks) and not all(map(is_hook_of_ours, list(hooks.values())))


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
    """The modules of a model, their hooks and the attention in their configs, and whether these are what they were.

    All are held by weak references: what is gone may have left its id to another.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        configs = [_configs(module) for module in modules]
        self._forwards: dict[type[Any], Any] = {type(module): type(module).forward for module in modules}
        self._modules = [
            (ref(module), type(module), is_changed(module), _children(module), _ids(own))
            for module, own in zip(modules, configs, strict=True)
        ]
        self._configs: list[tuple[Any, str | None, dict[str, int]]] = []
        waiting = {id(config): config for own in configs for config in own.values()}
        while waiting:
            _, config = waiting.popitem()
            nested = _configs(config)
            self._configs.append((ref(config), getattr(config, _ATTENTION, None), _ids(nested)))
            waiting.update({id(each): each for each in nested.values()})

    def is_unchanged(self) -> bool:
        for known, cls, changed, children, configs in self._modules:
            module = known()
            if module is None or type(module) is not cls or is_changed(module) is not changed:
                return False
            if (children or module._modules) and _children(module) != children:
                return False
            if configs and not _are_there(vars(module), configs):
                return False
        for known, attention, nested in self._configs:
            config = known()
            if config is None or getattr(config, _ATTENTION, None) != attention or not _are_there(vars(config), nested):
                return False
        return all(cls.forward is forward for cls, forward in self._forwards.items())


def _children(module: nn.Module) -> tuple[Any, ...]:
    """Names, then ids: their order counts."""
    return *module._modules, *map(id, module._modules.values())


def _configs(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in list(vars(owner).items()) if isinstance(value, PreTrainedConfig)}


def _ids(named: Mapping[str, Any]) -> dict[str, int]:
    return {name: id(value) for name, value in named.items()}


def _are_there(members: Mapping[str, Any], known: Mapping[str, int]) -> bool:
    return all(id(members.get(name)) == number for name, number in known.items())


@dataclass(frozen=True, slots=True)
class Kept:
    """A copy and what it was made from."""

    modules: ModuleWatch
    weights: WeightWatch
    copy: Any

    def is_current(self) -> bool:
        return self.modules.is_unchanged() and self.weights.is_unchanged()


def kept_copy(
    kind: str,
    model: Any,
    make: Callable[[Any], Any],
    laid_out: Callable[[Any], Sequence[nn.Module]] = lambda _: (),
) -> Any:
    """``make(model)``, kept as the copy of this ``kind`` and made anew when what it does not share with ``model`` has changed.

    ``laid_out`` names the layers of ``model`` whose weights the copy holds in another form. A copy that is out of date
    is let go before the next one is made.
    """
    state = ModelState.of(model)
    with state.lock:  # two threads must not both make the copy that one of them throws away
        kept: Kept | None = state.copies.get(kind)
        if kept is not None and kept.is_current():
            return kept.copy
        state.copies.pop(kind, None)
        del kept
        watches = ModuleWatch(model), WeightWatch(laid_out(model))
        ours = make(model)
        if ours is not model:
            state.copies[kind] = Kept(*watches, ours)
        return ours
