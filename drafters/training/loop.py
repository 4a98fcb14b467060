"""The training loop: any module that returns a loss and hits, on any device through accelerate, resumable.

A run writes to its folder: ``state.pt`` (weights, optimizer and place in the data, once a minute and at Ctrl-C,
replaced atomically) and ``log.jsonl`` (one line for each report). Knows no drafter.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.files import write_file

RANKS = (1, 4, 8)  # reported: the target's best token is among so many best of the draft's
NUM_RANKS = 16
_STATE = "state.pt"
_LOG = "log.jsonl"

Batch = dict[str, Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How long and how hard to train. With ``minutes``, training ends after that time, and so does the schedule."""

    epochs: float = 3.0
    minutes: float | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.02  # share of the run
    weight_decay: float = 0.01
    clip: float = 1.0  # of the gradient's norm
    precision: str = "bf16"  # of the matrix products: bf16, fp16 or no
    device: str = "auto"
    seed: int = 0
    save_every_s: float = 45.0
    report_every_s: float = 15.0
    evaluate_every_s: float = 240.0

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "clip", "save_every_s", "report_every_s", "evaluate_every_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be no, bf16 or fp16, got {self.precision!r}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a module says of one batch."""

    loss: Tensor  # ()
    ranks: tuple[Tensor, ...]  # of each place (head, or step ahead): the target's best token's rank, 0 for the best


class Batches:
    """Where batches come from; the same epoch always gives the same ones in the same order."""

    def __init__(self, num_batches: int, epoch: Callable[[int], Iterator[Batch]]) -> None:
        self.num_batches, self.epoch = num_batches, epoch

    def start_at(self, epoch: int, index: int) -> Iterator[Batch]:
        batches = self.epoch(epoch)
        for _ in range(index):
            next(batches, None)
        return batches


@dataclass(slots=True)
class Meter:
    """Sums since the last report."""

    loss: float = 0.0
    num_batches: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    histogram: Tensor | None = None  # (P, NUM_RANKS + 1) how often each rank was the target's best; last: none of them

    def add(self, outcome: Outcome, num_tokens: int) -> None:
        self.loss += float(outcome.loss.detach())
        self.num_batches += 1
        self.num_tokens += num_tokens
        counts = [rank.clamp(max=NUM_RANKS).bincount(minlength=NUM_RANKS + 1) for rank in outcome.ranks]
        histogram = torch.stack(counts).cpu()
        self.histogram = histogram if self.histogram is None else self.histogram + histogram

    def table(self) -> list[list[float]]:
        """(P, NUM_RANKS): how often the draft's r-th best token is the target's best."""
        assert self.histogram is not None
        shares = self.histogram / self.histogram.sum(-1, keepdim=True).clamp(min=1)
        return [[round(share, 5) for share in row] for row in shares[:, :NUM_RANKS].tolist()]

    def facts(self) -> dict[str, Any]:
        table = torch.tensor(self.table())
        rates = [table[:, :rank].sum(-1).tolist() for rank in RANKS]
        facts: dict[str, Any] = {"loss": round(self.loss / max(self.num_batches, 1), 4)}
        for rank, values in zip(RANKS, rates, strict=True):
            facts[f"top{rank}"] = [round(value, 4) for value in values]
        # Of a chain whose places were independent; the true one is measured with the real tree at the end.
        facts["chain_length"] = round(1 + sum(math.prod(rates[0][: i + 1]) for i in range(len(rates[0]))), 3)
        return facts


@dataclass(slots=True)
class Place:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    index: int = 0  # batches done of this epoch
    elapsed_s: float = 0.0


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
            ValueError: the state in the folder belongs to another module or other settings.
            FloatingPointError: the loss is no longer finite.
        """
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        set_seed(self.settings.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        accelerator = Accelerator(mixed_precision=self.settings.precision, cpu=self.settings.device == "cpu")
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, self.settings.learning_rate, (0.9, 0.95), weight_decay=self.settings.weight_decay
        )
        self._resume(optimizer)
        module, optimizer = accelerator.prepare(self.module, optimizer)
        try:
            self._loop(accelerator, module, optimizer, parameters)
        finally:
            if accelerator.is_main_process:
                self._save(optimizer)
        meter = self._evaluate(accelerator, module)
        facts = {**self._where(), **meter.facts()}
        self._log(accelerator, {"kind": "final", **facts})
        return {**facts, "table": meter.table()}

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        if self.settings.minutes is not None:
            return self.place.elapsed_s / (60 * self.settings.minutes)
        return self.place.step / max(1.0, self.settings.epochs * self.train.num_batches)

    def _loop(self, accelerator: Any, module: nn.Module, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        meter, saved, evaluated = Meter(), self.place.elapsed_s, self.place.elapsed_s
        while self.progress < 1:
            for batch in self.train.start_at(self.place.epoch, self.place.index):
                started = time.perf_counter()
                mine = _share(batch, accelerator.num_processes, accelerator.process_index)
                for group in optimizer.param_groups:
                    group["lr"] = self._learning_rate()
                outcome = module({key: tensor.to(accelerator.device) for key, tensor in mine.items()})
                accelerator.backward(outcome.loss)
                accelerator.clip_grad_norm_(parameters, self.settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                if not math.isfinite(loss := float(outcome.loss.detach())):
                    raise FloatingPointError(
                        f"the loss at step {self.place.step} is {loss}; resume with a lower learning rate"
                    )
                seconds = time.perf_counter() - started
                meter.add(outcome, batch["tokens"].numel())
                meter.seconds += seconds
                self.place.step += 1
                self.place.index += 1
                self.place.elapsed_s += seconds
                if meter.seconds >= self.settings.report_every_s:
                    facts = {"tokens_per_s": round(meter.num_tokens / meter.seconds), **meter.facts()}
                    self._log(accelerator, {"kind": "train", **self._where(), **facts})
                    meter = Meter()
                if self.place.elapsed_s - saved >= self.settings.save_every_s:
                    saved = self.place.elapsed_s
                    if accelerator.is_main_process:
                        self._save(optimizer)
                if self.place.elapsed_s - evaluated >= self.settings.evaluate_every_s:
                    evaluated = self.place.elapsed_s
                    held_out = self._evaluate(accelerator, module).facts()
                    self._log(accelerator, {"kind": "held_out", **self._where(), **held_out})
                if self.progress >= 1:
                    return
            self.place.epoch, self.place.index = self.place.epoch + 1, 0

    def _where(self) -> dict[str, Any]:
        return {**asdict(self.place), "progress": round(self.progress, 4)}

    def _learning_rate(self) -> float:
        """A linear rise, then half a cosine down to a fiftieth."""
        done, warmup = min(self.progress, 1.0), self.settings.warmup
        if done < warmup:
            return self.settings.learning_rate * max(done / warmup, 0.02)
        share = (done - warmup) / (1 - warmup)
        return self.settings.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)

    @torch.no_grad()
    def _evaluate(self, accelerator: Any, module: nn.Module) -> Meter:
        meter = Meter()
        module.eval()
        for batch in self.held_out.epoch(0):
            on_device = {key: tensor.to(accelerator.device) for key, tensor in batch.items()}
            meter.add(module(on_device), batch["tokens"].numel())
        module.train()
        return meter

    def _log(self, accelerator: Any, facts: dict[str, Any]) -> None:
        if not accelerator.is_main_process:
            return
        with (self.folder / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        rates = " ".join(f"{value:.3f}" for value in facts["top1"])
        speed = f", {facts['tokens_per_s']} tokens/s" if "tokens_per_s" in facts else ""
        self.say(
            f"{facts['kind'].replace('_', '-')}: step {facts['step']}, {100 * min(self.progress, 1):.0f} %, "
            f"loss {facts['loss']:.3f}, top-1 {rates}{speed}"
        )

    def _save(self, optimizer: Any) -> None:
        state = {
            "weights": {name: p.detach().cpu() for name, p in self.module.named_parameters() if p.requires_grad},
            "optimizer": optimizer.state_dict(),
            "place": asdict(self.place),
            "seed": self.settings.seed,
        }
        write_file(self.folder / _STATE, partial(torch.save, state))

    def _resume(self, optimizer: Any) -> None:
        file = self.folder / _STATE
        if not file.exists():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        own = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        if (
            shapes != {name: tuple(p.shape) for name, p in state["weights"].items()}
            or state["seed"] != self.settings.seed
        ):
            raise ValueError(
                f"{file} belongs to a run with other settings; name another folder, or delete it to start anew"
            )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        self.place = Place(**state["place"])
        self.say(f"resuming at step {self.place.step} ({100 * min(self.progress, 1):.0f} % done)")


def _share(batch: Batch, num_processes: int, index: int) -> Batch:
    """One process's rows of a batch; a batch too small for all is repeated."""
    if num_processes == 1:
        return batch
    rows = next(iter(batch.values())).shape[0]
    if rows < num_processes:
        return batch
    return {key: tensor[index::num_processes] for key, tensor in batch.items()}
