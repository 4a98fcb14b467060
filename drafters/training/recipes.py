"""What can be trained, and the defaults of each: the command line reads its options here, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar


def option(default: Any, meaning: str, *, at_least: int | None = None, metavar: str | None = None) -> Any:
    """A field that is an option of ``specdec train``, with its help and its smallest value."""
    return field(default=default, metadata={"help": meaning, "at_least": at_least, "metavar": metavar})


def check_smallest(recipe: Any) -> None:
    """Compare each field with its smallest value.

    Raises:
        ValueError: one is below.
    """
    for item in fields(recipe):
        smallest, value = item.metadata.get("at_least"), getattr(recipe, item.name)
        if smallest is not None and value < smallest:
            raise ValueError(f"{item.name} must be at least {smallest}, got {value}")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How long and how hard to train."""

    epochs: float = option(3.0, "Passes over the data.")
    minutes: float | None = option(None, "Train for this long instead; the learning-rate schedule is fitted to it.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    batch_tokens: int = option(2048, "Padded tokens of a training step.", at_least=1)
    precision: str = option("bf16", "Of the matrix products: bf16, fp16 or no.")
    warmup: float = 0.02  # share of the run
    weight_decay: float = 0.01
    clip: float = 1.0  # of the gradient's norm
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
        check_smallest(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FittedRecipe:
    """What all kinds share whose weights are fitted."""

    start_from: str | None = option(
        None,
        "Continue from this finished drafter, on other text, instead of from the target's own weights.",
        metavar="DIR",
    )
    settings: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        check_smallest(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeadRecipe(_FittedRecipe):
    """What heads share that draft from the target's hidden states."""

    draft_vocab: int = option(16384, "Token ids that it can draft: the most used ones; 0: all.", at_least=0)
    own_output: bool = option(False, "Train an output matrix instead of using the target's.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaRecipe(_HeadRecipe):
    """Medusa heads."""

    kind: ClassVar = "medusa"
    title: ClassVar = "Medusa heads"

    heads: int = option(4, "How many tokens ahead.", at_least=1)
    head_layers: int = option(1, "Residual blocks of a head.", at_least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleRecipe(_HeadRecipe):
    """The EAGLE-3 cell."""

    kind: ClassVar = "eagle"
    title: ClassVar = "EAGLE-3 draft head"

    steps: int = option(3, "Steps of the training-time test.", at_least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRecipe(_FittedRecipe):
    """The draft model."""

    kind: ClassVar = "draft"
    title: ClassVar = "Distilled draft model"

    layers: int = option(8, "Decoder layers of the target to keep.", at_least=1)
    settings: TrainSettings = field(default_factory=lambda: TrainSettings(learning_rate=3e-4))


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRecipe:
    """The start table."""

    kind: ClassVar = "recycling"
    title: ClassVar = "Start table of Token Recycling"

    contexts: int = option(250_000, "Contexts to keep: the most frequent ones.", at_least=1)

    def __post_init__(self) -> None:
        check_smallest(self)


Recipe = MedusaRecipe | EagleRecipe | DraftRecipe | TableRecipe
