"""What a trained drafter says of itself: how it is used, what it was trained on and how good it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.drafters import format_drafter
from specdec.drafters.training.recipes import Recipe, TableRecipe
from specdec.records.files import write_json, write_text


def usage(kind: str, folder: object) -> str:
    """The options of the command line that use what was trained, quoted for a shell."""
    if kind == "draft":
        return f"--drafter model --drafter-model {shlex.quote(str(folder))}"
    return f"--drafter {shlex.quote(trained_drafter(kind, folder))}"


def trained_drafter(kind: str, folder: object) -> str:
    """The drafter in ``folder`` as it is named, for all kinds but draft models."""
    return format_drafter(kind, {"start" if kind == "recycling" else "path": str(folder)})


def save_card(folder: Path, target: str, licence: str, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write what the drafter was trained on and how good it is, for readers (README.md) and programs."""
    facts = {key: value for key, value in facts.items() if key != "table"}
    options = {"kind": recipe.kind, **asdict(recipe)}
    write_json(folder / "training.json", {"target": target, "recipe": options, "facts": facts})
    write_text(folder / "README.md", model_card(target, licence, recipe, facts))


def model_card(target: str, licence: str, recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """The text of a model card."""
    places = "head" if recipe.kind == "medusa" else "step ahead"
    rows = zip(facts["top1"], facts["top4"], facts["top8"], strict=True)
    table = "\n".join(f"| {i + 1} | {a:.3f} | {b:.3f} | {c:.3f} |" for i, (a, b, c) in enumerate(rows))
    vocabulary = (
        f"- Draft vocabulary: {facts['draft_vocab_size']} ids, {100 * facts['coverage']:.1f} % of held-out choices.\n"
        if "coverage" in facts
        else ""
    )
    return f"""---
license: {licence}
base_model: {target}
tags: [speculative-decoding]
---
# {recipe.title} for {target}

Trained with `specdec train {recipe.kind}`; use it with `specdec generate {usage(recipe.kind, "THIS_FOLDER")}`. Output
stays exactly the target's: a drafter only changes how fast it comes.

- Data: {facts["conversations"]} conversations ({facts["num_train_tokens"]} training tokens), written and answered by the
  target itself. No data set was used.
{_how(recipe, facts)}
{vocabulary}- Mean acceptance length on held-out questions, greedy: {facts["mean_acceptance_length"]:.2f}.
- Licence: {licence}, the target's.

How often the target's choice is the draft's best, or among its best 4 or 8, on held-out text:

| {places} | top-1 | top-4 | top-8 |
| --- | --- | --- | --- |
{table}
"""


def _how(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """A model card's lines on how the drafter was made."""
    if isinstance(recipe, TableRecipe):
        return (
            f"- Nothing was fitted: the target's own next-token probabilities, averaged for the\n  {facts['num_contexts']} "
            "contexts of 1 to 3 tokens that occur most often there."
        )
    start = f"\n- Began as {Path(recipe.start_from).name}, trained before." if recipe.start_from else ""
    return (
        f"- Training: {facts['step']} steps of {recipe.settings.batch_tokens} tokens, "
        f"{facts['elapsed_s'] / 60:.0f} minutes\n  ({facts['epoch'] + 1} passes over the data).{start}"
    )
