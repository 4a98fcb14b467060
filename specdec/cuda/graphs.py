"""Verify passes recorded once and replayed: CUDA graphs for the passes that every step of a decode loop makes.

There is a recording for each number of rows, bucket of columns and capacity of the cache (``specdec.cuda.static_pass``).
What does not fit takes the ordinary path: prefill, models that verify chains only, more columns than the largest
bucket. Replays and ordinary passes share one cache and may follow each other in any order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from specdec.cuda.host_state import host_state
from specdec.cuda.recording import CudaGraphs, Recorder, Recording
from specdec.cuda.static_pass import WORD, PassOutput, PassShape, StepInputs, recordable, tree_of
from specdec.engine.cache import RaggedCache
from specdec.engine.hidden_states import HiddenStateHooks
from specdec.engine.masks import MaskStyle
from specdec.engine.model_state import ModelState
from specdec.engine.passes import RowPass
from specdec.engine.probe import agree
from specdec.engine.replay import Replay
from specdec.errors import UnsupportedOptionError
from specdec.interfaces import Scores
from specdec.kernels.attention import MAX_AREA
from specdec.kernels.gpu import device_unavailable

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)  # columns
_MIN_CAPACITY = 1024  # slots; capacities double, because each new one means to record everything again
_MAX_RECORDINGS = 32  # those that were not used for longest go first
_log = logging.getLogger("specdec.cuda.graphs")


@dataclass(frozen=True, slots=True)
class _Recorded:
    inputs: StepInputs
    recording: Recording[PassOutput]
    lengths: list[int]  # (B,) kept slots when it was made


class GraphedPasses:
    """The recorded passes over one cache.

    The first replay at other lengths than those of its recording is to be compared with an ordinary pass (see
    ``needs_check``): a model whose code held on to a number must not be wrong in silence.
    """

    def __init__(
        self, style: MaskStyle, recorders: Callable[[], Recorder], device: torch.device, made_for: Any = None
    ) -> None:
        self.made_for = made_for  # the state of the model that they hold
        self.fault = ""  # why nothing is recorded any more; empty while all is well
        self.needs_check = False
        self.num_recordings = self.num_replays = 0
        self.record_s = 0.0
        self.num_bytes = 0  # of what is recorded now
        self.style, self.recorders, self._device = style, recorders, device
        self._recorder = recorders()
        self._recorded: dict[PassShape, _Recorded] = {}
        self._buffers: list[Tensor] = []  # those of the cache that the recordings write to
        self._is_checked = False

    def score(
        self, model: Any, row_passes: Sequence[RowPass], cache: RaggedCache, capture: HiddenStateHooks
    ) -> list[Scores] | None:
        """Scores of ``parts``, which stand in neighbouring lines of ``cache``; None: take the ordinary path."""
        shape = self._shape(row_passes, cache, capture)
        if shape is None:
            return None
        buffers = [buffer for pair in cache.pairs if pair for buffer in pair]
        if any(a is not b for a, b in zip_longest(buffers, self._buffers)):
            self.forget()
            self._buffers = buffers
        known = self._recorded.pop(shape, None)
        if known is None:
            known = self._record(model, shape, row_passes, cache, capture)
            if known is None:
                return None
        else:
            known.inputs.load(row_passes)
            self.needs_check = not self._is_checked and known.lengths != _lengths(row_passes)
        self._recorded[shape] = known  # the newest stands last
        self.num_replays += 1
        return known.recording.replay().scores(row_passes)

    def check(self, replayed: Sequence[Scores], ordinary: Sequence[Scores]) -> None:
        """Compare a replay with an ordinary pass over the same parts; ``fault`` says what came of it."""
        self.needs_check, self._is_checked = False, True
        if not all(agree(got.logits, expected.logits) for got, expected in zip(replayed, ordinary, strict=True)):
            self._give_up("a replay gave other logits than an ordinary pass")

    def forget(self) -> None:
        """Drop all recordings and the memory that they share."""
        self._recorded.clear()
        self._buffers, self.num_bytes = [], 0
        self._recorder = self.recorders()

    def _shape(self, row_passes: Sequence[RowPass], cache: RaggedCache, capture: HiddenStateHooks) -> PassShape | None:
        """What to replay, with room for it in ``cache``; None: it does not fit."""
        if self.fault or any(row_pass.tree is None for row_pass in row_passes) or not cache.capacity:
            return None
        num_columns = _at_least(BUCKETS, max(len(row_pass.new_tokens) for row_pass in row_passes))
        behind = max(row_pass.base + len(tree_of(row_pass)) - row_pass.cache_row.length for row_pass in row_passes)
        area = -(-behind // WORD) * WORD
        if num_columns is None or area > MAX_AREA:
            return None
        needed = max(max(row_pass.cache_row.length + area, row_pass.start + num_columns) for row_pass in row_passes)
        if needed > cache.capacity:
            cache.make_room(max(_MIN_CAPACITY, 1 << (needed - 1).bit_length()))
        else:
            cache.make_room(cache.capacity)  # rows may be reserved that no pass has seen
        first = row_passes[0].cache_row.index
        return PassShape(first, len(row_passes), num_columns, area, cache.capacity, capture.hidden, capture.layers)

    def _record(
        self, model: Any, shape: PassShape, row_passes: Sequence[RowPass], cache: RaggedCache, capture: HiddenStateHooks
    ) -> _Recorded | None:
        while len(self._recorded) >= _MAX_RECORDINGS:
            self.num_bytes -= self._recorded.pop(next(iter(self._recorded))).recording.num_bytes
        inputs = StepInputs(shape, self._device)
        inputs.load(row_passes)
        try:
            recording = self._recorder.record(recordable(model, self.style, shape, inputs, cache, capture))
        except RuntimeError as error:
            self._give_up(f"{type(model).__name__} cannot be recorded: {str(error).splitlines()[0]}")
            return None
        self.num_recordings += 1
        self.record_s += recording.seconds
        self.num_bytes += recording.num_bytes
        return _Recorded(inputs, recording, _lengths(row_passes))

    def _give_up(self, fault: str) -> None:
        self.fault = fault
        self.forget()
        _log.warning("passes are no longer captured: %s", fault)


class GraphPool:
    """Caches and recorded passes that engines on ``model`` left behind when their last row ended.

    A recording takes longer than many passes, and generate() builds an engine at every call.
    """

    def __init__(self, model: Any, recorders: Callable[[], Recorder]) -> None:
        self._model, self._recorders = model, recorders

    def borrow(self, style: MaskStyle, new_cache: Callable[[], RaggedCache]) -> tuple[RaggedCache, GraphedPasses]:
        """Those that were recorded when an attribute was another, or a weight lay elsewhere, are dropped."""
        wanted = style, self._recorders, torch.is_inference_mode_enabled(), host_state(self._model)
        state = ModelState.of(self._model)
        with state.lock:
            while state.idle_replays:
                cache, passes = state.idle_replays.pop()
                if passes.made_for == wanted:
                    return cache, passes
        device = self._model.get_input_embeddings().weight.device
        return new_cache(), GraphedPasses(style, self._recorders, device, made_for=wanted)

    def give_back(self, cache: RaggedCache, replay: Replay) -> None:
        state = ModelState.of(self._model)
        with state.lock:
            state.idle_replays.append((cache, replay))

    def beside(self, model: Any) -> GraphPool:
        return GraphPool(model, self._recorders)


@dataclass(frozen=True, slots=True)
class GraphRecorders:
    """Makes recorders of CUDA graphs; equal for equal devices."""

    device: torch.device

    def __call__(self) -> Recorder:
        return CudaGraphs(self.device)


def graph_pool(model: Any) -> GraphPool:
    """CUDA graphs for ``CausalLM(model, replays=...)``.

    Raises:
        UnsupportedOptionError: the model lies elsewhere than on one GPU, or our kernels cannot run there.
    """
    devices = {parameter.device for parameter in model.parameters()}
    device = model.get_input_embeddings().weight.device
    fault = f"the model lies on {len(devices)} devices" if len(devices) > 1 else device_unavailable(device)
    if fault:
        raise UnsupportedOptionError(
            f"CUDA graphs need a model on one GPU and attention by our own kernels: {fault}; leave cuda_graphs out"
        )
    return GraphPool(model, GraphRecorders(device))


def _at_least(sizes: Sequence[int], wanted: int) -> int | None:
    return next((size for size in sizes if size >= wanted), None)


def _lengths(row_passes: Sequence[RowPass]) -> list[int]:
    return [row_pass.cache_row.length for row_pass in row_passes]
