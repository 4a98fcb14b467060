"""The training loop: any module that returns a loss and hits, on any device through accelerate, resumable.

A run writes to its folder: ``state.pt`` (weights, optimizer, fp16's loss scale and place in the data, once a minute and
at Ctrl-C, replaced atomically) and ``log.jsonl`` (one line for each report). Knows no drafter.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.training.outcome import Batch, Batches, Meter, Outcome
from specdec.drafters.training.recipes import TrainSettings
from specdec.drafters.training.run_state import Place, RunState

_STATE = "state.pt"
_LOG = "log.jsonl"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What accelerate made of a run's parts."""

    accelerator: Any
    module: nn.Module
    optimizer: Any
    parameters: Sequence[Tensor]

    def agreed(self, value: float) -> float:
        """The mean over all processes: they must take the same turns."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "mean"))


@dataclass(slots=True)
class Trainer:
    """Fits ``module``, whose ``forward(batch)`` returns an Outcome; only parameters that require a gradient change.

    Args:
        module: what is trained. Saved states hold its trainable parameters only.
        train: batches to learn from.
        held_out: batches to judge by.
        folder: where states and the log go; a state that lies there is resumed from.
        say: gets lines of progress.
    """

    module: nn.Module
    train: Batches
    held_out: Batches
    settings: TrainSettings
    folder: Path
    say: Say = print
    place: Place = field(default_factory=Place)

    def run(self) -> dict[str, Any]:
        """Train to the end and return the held-out facts, with the whole table of ranks; Ctrl-C saves the state first.

        Raises:
            ValueError: the state in the folder belongs to another module or other settings, or there are no batches.
            FloatingPointError: the loss or its gradient is no longer finite; the last state saved is from before.
        """
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        if not self.train.num_batches or not self.held_out.num_batches:
            raise ValueError("there is nothing to train on or nothing held out: every conversation there is too short")
        set_seed(self.settings.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        accelerator = Accelerator(mixed_precision=self.settings.precision, cpu=self.settings.device == "cpu")
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, self.settings.learning_rate, (0.9, 0.95), weight_decay=self.settings.weight_decay
        )
        self._resume(optimizer, accelerator.scaler)
        module, optimizer = accelerator.prepare(self.module, optimizer)
        fit = _Prepared(accelerator, module, optimizer, parameters)
        with warnings.catch_warnings():
            # Norms keep their float32 weights where the rest runs in 16 bits, on purpose.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            return self._fit(fit)

    def _fit(self, fit: _Prepared) -> dict[str, Any]:
        try:
            self._loop(fit)
        except FloatingPointError:
            raise
        except BaseException:
            self._save(fit)
            raise
        self._save(fit)
        meter = self._evaluate(fit)
        facts = {**self._where(), **meter.facts()}
        self._log(fit, {"kind": "final", **facts})
        return {**facts, "table": meter.table()}

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        if self.settings.minutes is not None:
            return self.place.elapsed_s / (60 * self.settings.minutes)
        return self.place.step / max(1.0, self.settings.epochs * self.train.num_batches)

    def _loop(self, fit: _Prepared) -> None:
        meter, saved, evaluated = Meter(), self.place.elapsed_s, self.place.elapsed_s
        while self.progress < 1:
            for batch in self.train.start_at(self.place.epoch, self.place.index):
                self._step(fit, batch, meter)
                if meter.seconds >= self.settings.report_every_s:
                    facts = {"tokens_per_s": round(meter.num_tokens / meter.seconds), **meter.facts()}
                    self._log(fit, {"kind": "train", **self._where(), **facts})
                    meter = Meter()
                if self.place.elapsed_s - saved >= self.settings.save_every_s:
                    saved = self.place.elapsed_s
                    self._save(fit)
                if self.place.elapsed_s - evaluated >= self.settings.evaluate_every_s:
                    evaluated = self.place.elapsed_s
                    self._log(fit, {"kind": "held_out", **self._where(), **self._evaluate(fit).facts()})
                if self.progress >= 1:
                    return
            self.place = replace(self.place, epoch=self.place.epoch + 1, index=0)

    def _step(self, fit: _Prepared, batch: Batch, meter: Meter) -> None:
        """Learn from one batch. Whatever stops it, weights and ``place`` agree afterwards."""
        started = time.perf_counter()
        mine = _share(batch, fit.accelerator.num_processes, fit.accelerator.process_index)
        for group in fit.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        fit.optimizer.zero_grad()
        outcome: Outcome = fit.module({key: tensor.to(fit.accelerator.device) for key, tensor in mine.items()})
        self._check_finite("loss", fit.agreed(float(outcome.loss.detach())))
        fit.accelerator.backward(outcome.loss)
        norm = float(fit.accelerator.clip_grad_norm_(fit.parameters, self.settings.clip))
        if self.settings.precision != "fp16":  # there, steps whose gradient overflows are left out
            self._check_finite("gradient's norm", norm)
        with _uninterrupted():
            fit.optimizer.step()
            seconds = fit.agreed(time.perf_counter() - started)
            self.place.step += 1
            self.place.index += 1
            self.place.elapsed_s += seconds
        meter.add(outcome, batch["tokens"].numel())
        meter.seconds += seconds

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} at step {self.place.step} is {value}; resume with a lower learning rate"
            )

    def _where(self) -> dict[str, Any]:
        return {**asdict(self.place), "progress": round(self.progress, 4)}

    def _learning_rate(self) -> float:
        """A linear rise, then half a cosine down to a fiftieth."""
        progress, warmup = min(self.progress, 1.0), self.settings.warmup
        if progress < warmup:
            return self.settings.learning_rate * max(progress / warmup, 0.02)
        share = (progress - warmup) / (1 - warmup)
        return self.settings.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)

    @torch.no_grad()
    def _evaluate(self, fit: _Prepared) -> Meter:
        meter = Meter()
        fit.module.eval()
        for batch in self.held_out.epoch(0):
            on_device = {key: tensor.to(fit.accelerator.device) for key, tensor in batch.items()}
            meter.add(fit.module(on_device), batch["tokens"].numel())
        fit.module.train()
        return meter

    def _log(self, fit: _Prepared, facts: dict[str, Any]) -> None:
        if not fit.accelerator.is_main_process:
            return
        with (self.folder / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        rates = " ".join(f"{value:.3f}" for value in facts["top1"])
        speed = f", {facts['tokens_per_s']} tokens/s" if "tokens_per_s" in facts else ""
        self.say(
            f"{facts['kind'].replace('_', '-')}: step {facts['step']}, {100 * min(self.progress, 1):.0f} %, "
            f"loss {facts['loss']:.3f}, top-1 {rates}{speed}"
        )

    def _save(self, fit: _Prepared) -> None:
        if fit.accelerator.is_main_process:
            self._state.save(fit.optimizer, fit.accelerator.scaler, self.place)

    def _resume(self, optimizer: Any, scaler: Any) -> None:
        place = self._state.restore(optimizer, scaler)
        if place is not None:
            self.place = place
            self.say(f"resuming at step {place.step} ({100 * min(self.progress, 1):.0f} % done)")

    @property
    def _state(self) -> RunState:
        return RunState(self.folder / _STATE, self.module, self.settings.seed)


def _share(batch: Batch, num_processes: int, index: int) -> Batch:
    """One process's rows of a batch; a batch too small for all is repeated."""
    if num_processes == 1:
        return batch
    rows = next(iter(batch.values())).shape[0]
    if rows < num_processes:
        return batch
    return {key: tensor[index::num_processes] for key, tensor in batch.items()}


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C comes to the main thread
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if waiting:
        signal.raise_signal(signal.SIGINT)
