"""Views of modules and configs: objects that share all state with another one but for a few attributes.

A view has the class of its original (a subclass of the same name) and the very same ``__dict__``. So an attribute, a
buffer, a weight or a hook that is set on one of them, at any time, is set on both. What a view has of its own stands in
slots, where Python looks before it looks into the ``__dict__``: the children of a module, the attention of a config.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from torch import nn


class View:
    """What the classes of views have in common."""

    __slots__ = ()
    _viewed_class: type[Any]
    _own_names: tuple[str, ...]

    def __init_subclass__(cls, **_: Any) -> None:
        """Without what a model's or a config's class does to its subclasses."""

    def __reduce_ex__(self, _: Any) -> Any:
        """A copy, or what is read back from a file, is an ordinary object with state of its own."""
        return copyreg.__newobj__, (type(self)._viewed_class,), {**vars(self), **own_attributes(self)}  # type: ignore[attr-defined]


class ModuleView(View):
    """A view of a module, with children of its own: setting one leaves the original as it is."""

    __slots__ = ()
    _modules: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        children = self._modules
        return children[name] if name in children else super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) or name in self._modules:
            self._modules[name] = value
        else:
            super().__setattr__(name, value)


_CLASSES: WeakValueDictionary[tuple[type, tuple[str, ...]], type] = WeakValueDictionary()


def view_of(original: Any, own: Mapping[str, Any]) -> Any:
    """A view of ``original``, which may be one itself, with ``own`` in the place of its attributes of these names."""
    viewed = type(original)._viewed_class if isinstance(original, View) else type(original)
    names = tuple(sorted(own))
    view = object.__new__(_view_class(viewed, names))
    object.__setattr__(view, "__dict__", vars(original))
    for name in names:
        object.__setattr__(view, name, own[name])
    return view


def own_attributes(view: View) -> dict[str, Any]:
    """What ``view`` does not share with its original."""
    return {name: object.__getattribute__(view, name) for name in type(view)._own_names}


def _view_class(viewed: type[Any], names: tuple[str, ...]) -> type[Any]:
    known = _CLASSES.get((viewed, names))
    if known is None:
        mixin = ModuleView if issubclass(viewed, nn.Module) else View
        body = {key: getattr(viewed, key) for key in ("__module__", "__qualname__", "__doc__")}
        body |= {"__slots__": names, "_viewed_class": viewed, "_own_names": names}
        known = types.new_class(viewed.__name__, (mixin, viewed), {}, lambda namespace: namespace.update(body))
        _CLASSES[viewed, names] = known
    return known
