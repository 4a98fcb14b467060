"""The file that a training run resumes from: weights, optimizer, fp16's loss scale and place in the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specdec.drafters.heads.checkpoint_io import check_tensors, read_plain
from specdec.errors import CheckpointError
from specdec.records.files import write_file


@dataclass(slots=True)
class Place:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    index: int = 0  # batches done of this epoch
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run that trains ``module`` with ``seed``, in ``file``; only trainable parameters are stored."""

    file: Path
    module: nn.Module
    seed: int

    def save(self, optimizer: Any, scaler: Any, place: Place) -> None:
        """Replace the file, atomically."""
        state = {
            "weights": {name: p.detach().cpu() for name, p in self._trainable().items()},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            "place": asdict(place),
            "seed": self.seed,
        }
        write_file(self.file, partial(torch.save, state))

    def restore(self, optimizer: Any, scaler: Any) -> Place | None:
        """Take over what the file holds and return where the run stood; None without a file.

        Raises:
            CheckpointError: the file cannot be read.
            ValueError: it belongs to another module or other settings.
        """
        if not self.file.exists():
            return None
        advice = "name another folder, or delete it to start anew"
        try:
            state = read_plain(self.file)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {advice}") from None
        try:
            return self._restored(state, optimizer, scaler)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.file} belongs to a run with other settings ({error}); {advice}") from None

    def _restored(self, state: dict[str, Any], optimizer: Any, scaler: Any) -> Place:
        """Take over ``state``, as ``save`` writes it; whatever is wrong with it is an error."""
        if state["seed"] != self.seed:
            raise ValueError(f"seed {state['seed']}, not {self.seed}")
        parameters = self._trainable()
        check_tensors(state["weights"], {name: tuple(p.shape) for name, p in parameters.items()}, "the state")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        for p, moments in optimizer.state.items():
            if any(moment.dim() and moment.shape != p.shape for moment in moments.values()):
                raise ValueError("its optimizer is of other weights")
        if scaler is not None and state.get("scaler"):  # a run in another precision has none
            scaler.load_state_dict(state["scaler"])
        return Place(**state["place"])

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}
