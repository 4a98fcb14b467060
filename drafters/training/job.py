"""One training run: what every kind of drafter needs to be trained, from features on disk to a folder to load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from specdec.drafters.training.batches import Split, text_batches
from specdec.drafters.training.features import FeatureStore
from specdec.drafters.training.loop import Trainer
from specdec.drafters.training.recipes import TrainSettings

Facts = dict[str, Any]
RecipeT = TypeVar("RecipeT")


@dataclass(slots=True)
class Job:
    """Trains a drafter for ``model`` on ``store``; the drafter and the state of the run go to ``folder``."""

    model: Any  # a transformers causal LM with plain layers
    store: FeatureStore
    folder: Path
    say: Callable[[str], None]
    split: Split = field(init=False)

    def __post_init__(self) -> None:
        self.split = Split.of(len(self.store))

    def run(self, train: Callable[[Job, RecipeT], Facts], recipe: RecipeT) -> Facts:
        """Train by ``recipe`` to the end (or resume a run that was stopped), save the drafter, return facts about it."""
        num_tokens = sum(sum(self.store.sizes(shard)) for shard in self.split.train)
        self.say(f"training on {num_tokens} tokens, {len(self.split.held_out)} shards held out")
        return {"num_train_tokens": num_tokens, **train(self, recipe)}

    def fit(self, module: nn.Module, settings: TrainSettings) -> Facts:
        """Train ``module``, whose ``forward(batch)`` returns an Outcome, and evaluate it on the held-out text."""
        train = text_batches(self.store, self.split.train, settings.batch_tokens, settings.seed)
        held_out = text_batches(self.store, self.split.held_out, settings.batch_tokens, None)
        settings = replace(settings, device=self.model.device.type)
        return Trainer(module, train, held_out, settings, self.folder / "run", self.say).run()

    def save(self, write: Callable[[], object]) -> None:
        """Write a file; of several processes, only the first one does."""
        from accelerate import PartialState

        if PartialState().is_main_process:
            write()

    def output_rows(self, ids: Tensor) -> Tensor:
        """(Vd, H) the target's output matrix at ``ids`` (Vd,), in float32."""
        matrix: Tensor = self.model.get_output_embeddings().weight.detach()
        return matrix[ids.to(matrix.device)].float()
