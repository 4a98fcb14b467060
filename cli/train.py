"""``specdec train``: heads, a cell, a small draft model or a table of successors for any target, from nothing but it."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli import options
from specdec.cli.text import tell
from specdec.cli.train_data import SELF, Source
from specdec.hub.catalog import DEFAULT_MODEL, known_models
from specdec.hub.load import load_model, load_tokenizer

EXAMPLE = "Example: specdec train eagle --conversations 2000 --minutes 30 --output my-eagle"
_NUM_JUDGES = 24  # held-out questions that the finished drafter is judged on
_JUDGED_TOGETHER = 8
_JUDGED_NODES = 16
_PATIENCE = timedelta(days=7)  # of the processes that wait while the first one makes the data


class Kind(StrEnum):
    MEDUSA = "medusa"
    EAGLE = "eagle"
    DRAFT = "draft"
    RECYCLING = "recycling"


def train(
    kind: Annotated[
        Kind,
        typer.Argument(help="medusa: heads; eagle: an EAGLE-3 cell; draft: a small causal LM; recycling: a table."),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The finished drafter, and the state of the run.")],
    target: options.Target = DEFAULT_MODEL,
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help=f"Questions as JSONL, as for bench; {SELF}: the target writes them itself."),
    ] = SELF,
    conversations: Annotated[int, typer.Option(metavar="N", help="How many the target answers.")] = 2000,
    max_answer_tokens: Annotated[int, typer.Option(metavar="N", help="The longest answer.")] = 256,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keeps text and features for other runs; default: in the cache folder."),
    ] = None,
    epochs: Annotated[float, typer.Option(metavar="X", help="Passes over the data.")] = 3.0,
    minutes: Annotated[
        float | None, typer.Option(metavar="X", help="Train for this time instead; the schedule fits it.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="X", help="Default: 1e-3; for draft 3e-4.")] = None,
    draft_vocab: Annotated[
        int, typer.Option(metavar="N", help="Token ids that medusa and eagle can draft: the most used ones; 0: all.")
    ] = 16384,
    heads: Annotated[int, typer.Option(metavar="N", help="medusa: how many tokens ahead.")] = 4,
    head_layers: Annotated[int, typer.Option(metavar="N", help="medusa: residual blocks of a head.")] = 1,
    own_output: Annotated[
        bool,
        typer.Option("--own-output", help="medusa and eagle: train an output matrix instead of using the target's."),
    ] = False,
    steps: Annotated[int, typer.Option(metavar="N", help="eagle: steps of the training-time test.")] = 3,
    layers: Annotated[int, typer.Option(metavar="N", help="draft: decoder layers to keep.")] = 8,
    contexts: Annotated[int, typer.Option(metavar="N", help="recycling: the most frequent ones are kept.")] = 250_000,
    start_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Go on from this finished drafter, on other text, instead of from the target."
        ),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(metavar="N", help="Padded tokens of a training step.")] = 2048,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows that are generated at a time.")] = 64,
    precision: Annotated[str, typer.Option(metavar="NAME", help="Of training: bf16, fp16 or no.")] = "bf16",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
) -> None:
    """Train a drafter for a target.

    Three stages, each of which goes on where it was stopped: the target writes and answers questions (or answers
    yours), its hidden states are computed once, and the drafter is trained on them. Ends with the mean acceptance
    length on held-out questions.
    """
    from accelerate import PartialState

    from specdec.drafters.training.job import Job, Recipe, usage
    from specdec.drafters.training.loop import TrainSettings

    options.set_threads(threads)
    rate = (3e-4 if kind is Kind.DRAFT else 1e-3) if learning_rate is None else learning_rate
    settings = TrainSettings(epochs, minutes, rate, precision=precision, seed=seed)
    start = None if start_from is None else str(start_from)
    sizes = (batch_tokens, draft_vocab, heads, head_layers)
    recipe = Recipe(kind.value, settings, *sizes, own_output, steps, layers, contexts, start)
    source = Source(target, data, conversations, max_answer_tokens, batch_size, seed, work)
    folder = output.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    processes = PartialState(cpu=device == "cpu", timeout=_PATIENCE)  # one, unless accelerate launch started more
    with processes.main_process_first():
        model, tokenizer = load_plain(target, dtype, device)
        store, texts = source.prepare(model, tokenizer, needs_layers=kind is Kind.EAGLE)
    job = Job(model, store, recipe, folder, tell)
    facts = job.run()
    if not processes.is_main_process:
        return
    if kind is Kind.DRAFT:
        tokenizer.save_pretrained(folder)
    length = acceptance(kind, folder, model, [list(text.tokens[: text.num_prompt]) for text in texts[-_NUM_JUDGES:]])
    tell(f"mean acceptance length on {_NUM_JUDGES} held-out questions, greedy: {length:.2f}")
    job.save_card(
        target, licence(target), {**facts, "mean_acceptance_length": round(length, 3), "conversations": len(texts)}
    )
    print(f"{folder}: use it with {usage(kind, folder)}")


def load_plain(target: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The target with the layers that transformers gives it, and its tokenizer."""
    model = load_model(target, dtype=dtype, device=device, progress=tell)
    return model, load_tokenizer(target, progress=tell)


def acceptance(kind: Kind, folder: Path, model: Any, questions: list[list[int]]) -> float:
    """Mean acceptance length of the finished drafter with the tree that it would draft, greedy."""
    from specdec.cli.acceptance import measure_acceptance
    from specdec.drafters.training.job import trained_drafter

    drafts = (load_model(str(folder), dtype="auto", device=str(model.device)),) if kind is Kind.DRAFT else ()
    spec = "model:shape=best-first" if kind is Kind.DRAFT else trained_drafter(kind, folder)
    stats = measure_acceptance(model, spec, questions, _JUDGED_NODES, drafts, _JUDGED_TOGETHER)
    return stats.mean_acceptance_length


def licence(target: str) -> str:
    """A built-in target's licence; of others it is not known."""
    return next((known.licence.lower() for known in known_models() if known.name == target), "other")
