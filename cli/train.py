"""``specdec train``: heads, a cell, a small draft model or a table of successors for any target, from nothing but it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from specdec.cli import options
from specdec.cli.groups import GroupedCommand, grouped
from specdec.cli.text import tell
from specdec.cli.train_data import Source
from specdec.drafters.training.recipes import DraftRecipe, EagleRecipe, MedusaRecipe, TableRecipe
from specdec.hub.catalog import known_models
from specdec.hub.load import load_model, load_tokenizer

if TYPE_CHECKING:
    from specdec.drafters.training.job import Facts, Job

RecipeT = TypeVar("RecipeT", MedusaRecipe, EagleRecipe, DraftRecipe, TableRecipe)

_NUM_JUDGES = 24  # held-out questions that the finished drafter is judged on
_JUDGED_TOGETHER = 8
_JUDGED_NODES = 16
_PATIENCE = timedelta(days=7)  # of the processes that wait while the first one makes the data

app = typer.Typer(
    help="Train a drafter for a target.\n\nThree stages, each of which resumes where it was stopped: the target writes and "
    "answers questions (or answers yours), its hidden states are computed once, and the drafter is trained on them. Ends "
    "with the mean acceptance length on held-out questions.",
    epilog="Example: specdec train eagle --conversations 2000 --minutes 30 --output my-eagle",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Output = Annotated[Path, typer.Option(metavar="DIR", help="The finished drafter, and the state of the run.")]


def _command(function: Callable[..., None]) -> None:
    """Register ``function`` as the subcommand of its name."""
    name = function.__name__
    epilog = f"Example: specdec train {name} --target MODEL --output my-{name}"
    app.command(name, cls=GroupedCommand, epilog=epilog)(grouped(function))


@_command
def medusa(output: Output, recipe: MedusaRecipe, source: Source, machine: options.Machine) -> None:
    """Medusa heads on the last hidden state.

    One head for each position ahead (Cai et al., 2024): the lowest cost per draft.
    """
    from specdec.drafters.training.medusa import train_medusa

    _train(train_medusa, recipe, output, source, machine)


@_command
def eagle(output: Output, recipe: EagleRecipe, source: Source, machine: options.Machine) -> None:
    """EAGLE-3's layer over three hidden states.

    One decoder layer that runs on its own outputs (Li et al., 2025): the most accepted tokens for its cost. Needs a target
    with at least three layers.
    """
    from specdec.drafters.training.eagle import train_eagle

    _train(train_eagle, recipe, output, source, machine)


@_command
def draft(output: Output, recipe: DraftRecipe, source: Source, machine: options.Machine) -> None:
    """A small LM of the target's own layers.

    Some of its decoder layers, taught to answer like all of them; works with anything that takes a draft model.
    """
    from specdec.drafters.training.draft import train_draft

    _train(train_draft, recipe, output, source, machine)


@_command
def recycling(output: Output, recipe: TableRecipe, source: Source, machine: options.Machine) -> None:
    """A start table for Token Recycling.

    What the target expects after frequent contexts of its own text (Luo et al., 2024). Nothing is fitted.
    """
    from specdec.drafters.training.start_table import train_table

    _train(train_table, recipe, output, source, machine)


def _train(
    train: Callable[[Job, RecipeT], Facts], recipe: RecipeT, output: Path, source: Source, machine: options.Machine
) -> None:
    from accelerate import PartialState

    from specdec.drafters.training.card import save_card, usage
    from specdec.drafters.training.job import Job

    options.set_threads(machine.threads)
    if not isinstance(recipe, TableRecipe):
        recipe = replace(recipe, settings=replace(recipe.settings, seed=source.seed))
    folder = output.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    processes = PartialState(
        cpu=machine.device == "cpu", timeout=_PATIENCE
    )  # one, unless accelerate launch started more
    with processes.main_process_first():
        model, tokenizer = load_plain(source.target, machine.dtype, machine.device)
        store, texts = source.prepare(model, tokenizer, needs_layers=recipe.kind == "eagle")
    facts = Job(model, store, folder, tell).run(train, recipe)
    if not processes.is_main_process:
        return
    if recipe.kind == "draft":
        tokenizer.save_pretrained(folder)
    questions = [list(text.tokens[: text.num_prompt]) for text in texts[-_NUM_JUDGES:]]
    length = acceptance(recipe.kind, folder, model, questions)
    tell(f"mean acceptance length on {_NUM_JUDGES} held-out questions, greedy: {length:.2f}")
    facts |= {"mean_acceptance_length": round(length, 3), "conversations": len(texts)}
    save_card(folder, source.target, licence(source.target), recipe, facts)
    print(f"{folder}: use it with {usage(recipe.kind, folder)}")


def load_plain(target: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The target with the layers that transformers gives it, and its tokenizer."""
    model = load_model(target, dtype=dtype, device=device, progress=tell)
    return model, load_tokenizer(target, progress=tell)


def acceptance(kind: str, folder: Path, model: Any, questions: list[list[int]]) -> float:
    """Mean acceptance length of the finished drafter with the tree that it would draft, greedy."""
    from specdec.cli.acceptance import measure_acceptance
    from specdec.drafters.training.card import trained_drafter

    drafts = (load_model(str(folder), dtype="auto", device=str(model.device)),) if kind == "draft" else ()
    spec = "model:shape=best-first" if kind == "draft" else trained_drafter(kind, folder)
    stats = measure_acceptance(model, spec, questions, _JUDGED_NODES, drafts, _JUDGED_TOGETHER)
    return stats.mean_acceptance_length


def licence(target: str) -> str:
    """A built-in target's licence; of others it is not known."""
    return next((builtin.licence.lower() for builtin in known_models() if builtin.name == target), "other")
