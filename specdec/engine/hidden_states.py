"""Hidden states and chosen layer features of a forward pass, through hooks that live for that pass only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock, get_ident
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from specdec.interfaces import Scores

_HOOKING = Lock()  # torch numbers hooks without one: two threads could get the same number and lose a hook

_OURS = "specdec_capture"


def _ours(hook: Any) -> Any:
    setattr(hook, _OURS, True)
    return hook


def is_hook_of_ours(hook: Any) -> bool:
    """Whether it comes and goes with a pass and changes nothing in it; copies share their hooks with a model."""
    return callable(hook) and getattr(hook, _OURS, None) is True


@dataclass(slots=True)
class HiddenStates:
    """What the hooks saw in one pass; the last T columns of each."""

    hidden: Tensor | None  # (B, T, H)
    features: Tensor | None  # (B, T, F)


@dataclass(slots=True)
class HiddenStateHooks:
    """Context manager around one forward of ``model``; does nothing if nothing is asked for.

    It sees what the thread that entered it runs: threads may share a model, each with a Capture of its own.
    ``hidden`` is the input of the output matrix (after the final norm); ``layers`` are indices into what transformers
    calls ``hidden_states``: 0 is the embeddings, i the input of layer i.
    """

    model: Any
    hidden: bool
    layers: tuple[int, ...]
    needs_all_logits: bool = field(init=False)  # hidden states are only seen where a column's logits are computed
    _seen: dict[int, Tensor] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _thread: int = 0

    def __post_init__(self) -> None:
        head = self.model.get_output_embeddings()
        # What Llama 4 calls its decoder includes the output matrix.
        self.needs_all_logits = self.hidden and any(module is head for module in self.model.get_decoder().modules())
        num_layers = self.model.config.get_text_config().num_hidden_layers
        if any(not 0 <= i < num_layers for i in self.layers):
            raise ValueError(f"feature layers must be in [0, {num_layers}) for this model, got {self.layers}")

    @property
    def is_active(self) -> bool:
        return self.hidden or bool(self.layers)

    def including(self, hidden: bool, layers: Sequence[int]) -> HiddenStateHooks:
        """Of this and of what else is asked for; layers that are seen already keep their places."""
        return HiddenStateHooks(self.model, self.hidden or hidden, tuple(dict.fromkeys((*self.layers, *layers))))

    def pick(self, features: Tensor | None, layers: Sequence[int]) -> Tensor:
        """``layers`` of what was captured (..., F), in that order, one perhaps twice."""
        if features is None or not set(layers) <= set(self.layers):
            raise ValueError(
                f"features of layers {tuple(layers)} were not asked for; a drafter must be built with the engine that runs"
            )
        if tuple(layers) == self.layers:
            return features
        parts = features.chunk(len(self.layers), -1)
        return torch.cat([parts[self.layers.index(i)] for i in layers], -1)

    def __enter__(self) -> HiddenStateHooks:
        self._seen.clear()
        self._thread = get_ident()
        blocks: Any = decoder_layers(self.model) if self.layers else []
        inputs = {i: blocks[i] for i in self.layers}
        if self.needs_all_logits:
            inputs[-1] = self.model.get_output_embeddings()
        with _HOOKING:
            for key, module in inputs.items():
                self._handles.append(module.register_forward_pre_hook(self._input_hook(key), with_kwargs=True))
            if self.hidden and not self.needs_all_logits:
                self._handles.append(self.model.get_decoder().register_forward_hook(self._see_last))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self, num_columns: int) -> HiddenStates:
        """What was seen since the context was entered."""
        hidden = self._seen.pop(-1)[:, -num_columns:] if self.hidden else None
        features = None
        if self.layers:
            device = self._seen[self.layers[0]].device
            features = torch.cat([self._seen.pop(i)[:, -num_columns:].to(device) for i in self.layers], -1)
        return HiddenStates(hidden, features)

    @_ours
    def _see_last(self, _: nn.Module, __: Any, output: Any) -> None:
        if get_ident() == self._thread:
            self._seen[-1] = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def _input_hook(self, key: int) -> Any:
        # While this thread comes or goes, torch may call a hook without keywords in another one.
        @_ours
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if get_ident() == self._thread:
                self._seen[key] = args[0] if args else (kwargs or {})["hidden_states"]

        return see


def joined(passes: Sequence[Scores]) -> Scores:
    """One row's share of several passes in a row, the last of which scored the tree."""
    if len(passes) == 1:
        return passes[0]
    hidden = [s.hidden for s in passes if s.hidden is not None]
    features = [s.features for s in passes if s.features is not None]
    return Scores(passes[-1].logits, torch.cat(hidden) if hidden else None, torch.cat(features) if features else None)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a model's decoder layers: the one with as many entries as the config has layers."""
    num_layers = model.config.get_text_config().num_hidden_layers
    # Below the decoder only: a vision tower may have as many layers.
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {num_layers} decoder layers to take features from")
