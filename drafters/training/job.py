"""One training run: from features on disk to a finished drafter, for each kind of drafter."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters import format_drafter
from specdec.drafters.heads.checkpoint_io import check_vocab, read_json
from specdec.drafters.heads.eagle_cell import EagleCell, FeatureCell
from specdec.drafters.heads.eagle_config import EagleConfig
from specdec.drafters.heads.eagle_engine import head_layers, share_output
from specdec.drafters.heads.eagle_format import load_eagle, save_eagle
from specdec.drafters.heads.medusa_heads import MedusaHeads, load_medusa, save_medusa
from specdec.drafters.heads.shipped import target_facts
from specdec.drafters.training.batches import Split, text_batches
from specdec.drafters.training.draft import DraftTraining, pruned
from specdec.drafters.training.eagle import EagleTraining, warm_start
from specdec.drafters.training.features import FeatureStore
from specdec.drafters.training.loop import Trainer, TrainSettings
from specdec.drafters.training.medusa import MedusaTraining
from specdec.drafters.training.successors import gather, judge
from specdec.drafters.training.vocabulary import choose_vocabulary
from specdec.errors import CheckpointError
from specdec.hub.load import load_model
from specdec.records.files import write_json, write_text

_VOCABULARY = "draft_vocab.json"
KINDS = ("medusa", "eagle", "draft", "recycling")
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained, and how. Sizes that a kind does not have are ignored by it."""

    kind: str
    settings: TrainSettings
    batch_tokens: int = 2048
    draft_vocab: int = 16384  # 0: every id
    heads: int = 4
    head_layers: int = 1
    own_output: bool = False
    steps: int = 3
    layers: int = 8
    contexts: int = 250_000
    start_from: str | None = None  # a finished drafter whose weights the run begins with, instead of the target's own

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("batch_tokens", "heads", "head_layers", "steps", "layers", "contexts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kind == "recycling" and self.start_from is not None:
            raise ValueError("a start table is gathered anew from all text: leave start_from out")
        if self.draft_vocab < 0:
            raise ValueError(f"draft_vocab must be positive, or 0 for every id, got {self.draft_vocab}")


@dataclass(slots=True)
class Job:
    """Trains ``recipe`` for ``model`` on ``store``; the drafter and the state of the run go to ``folder``."""

    model: Any  # a transformers causal LM with plain layers
    store: FeatureStore
    recipe: Recipe
    folder: Path
    say: Callable[[str], None]

    def run(self) -> Facts:
        """Train to the end (or go on with a run that was stopped), save the drafter, and return what is known of it."""
        split = Split.of(len(self.store))
        facts: Facts = {"num_train_tokens": sum(sum(self.store.sizes(shard)) for shard in split.train)}
        self.say(f"training on {facts['num_train_tokens']} tokens, {len(split.held_out)} shards held out")
        if self.recipe.kind == "recycling":
            return facts | self._recycling(split)
        if self.recipe.kind == "draft":
            return facts | self._draft(split)
        start = self._start()
        ids, coverage = self._vocabulary(split, None if start is None else start.target_ids())
        self.say(f"draft vocabulary: {len(ids)} ids, which cover {100 * coverage:.1f} % of held-out choices")
        facts |= {"draft_vocab_size": len(ids), "coverage": round(coverage, 4)}
        if self.recipe.kind == "medusa":
            return facts | self._medusa(split, ids, start)
        return facts | self._eagle(split, ids, start)

    def _start(self) -> Any:
        """The heads or the cell that ``start_from`` names; None without it.

        Raises:
            CheckpointError: it was made for another target, or is of a form that is not trained here.
        """
        recipe = self.recipe
        if recipe.start_from is None:
            return None
        path, config = Path(recipe.start_from).expanduser(), self.model.config.get_text_config()
        load = load_medusa if recipe.kind == "medusa" else load_eagle
        start: Any = load(path, config.hidden_size, config.vocab_size)
        if isinstance(start, FeatureCell):
            raise CheckpointError(f"{path} is an EAGLE-1 or 2 head: only EAGLE-3 heads are trained here")
        if isinstance(start, EagleCell):
            layers = head_layers(start.config, config.num_hidden_layers)
            if layers != tuple(self.store.layers):
                raise CheckpointError(
                    f"{path} reads hidden_states{list(layers)} of its target, and heads are trained here on "
                    f"hidden_states{list(self.store.layers)}: it can be used, but not trained further"
                )
        shares = start.shares_output if recipe.kind == "medusa" else start.config.shares_output
        if shares == recipe.own_output:
            wanted = (
                "shares the target's output matrix: leave --own-output out" if shares else "has its own: --own-output"
            )
            raise CheckpointError(f"{path} {wanted}")
        return start

    def _vocabulary(self, split: Split, known: Tensor | None) -> tuple[Tensor, float]:
        """Chosen when the run begins: the rows of output matrices stand for these ids, whatever text is added later."""
        total = self.model.config.get_text_config().vocab_size
        file, size = self.folder / "run" / _VOCABULARY, self.recipe.draft_vocab or total
        if known is not None:
            size = len(known)
        elif file.exists():
            known = torch.tensor(read_json(file).get("ids", []))
            check_vocab(known, total, str(file))
        chosen = choose_vocabulary(self.store, split.train, split.held_out, total, size, known)
        if known is None:
            self._save(lambda: write_ids(file, chosen.ids))
        return chosen.ids, chosen.coverage

    def _fit(self, module: nn.Module, split: Split) -> Facts:
        seed = self.recipe.settings.seed
        train = text_batches(self.store, split.train, self.recipe.batch_tokens, seed)
        held_out = text_batches(self.store, split.held_out, self.recipe.batch_tokens, None)
        return Trainer(module, train, held_out, self._settings(), self.folder / "run", self.say).run()

    def _settings(self) -> TrainSettings:
        device = self.model.device.type
        return replace(self.recipe.settings, device=device)

    def _medusa(self, split: Split, ids: Tensor, start: MedusaHeads | None) -> Facts:
        config = self.model.config.get_text_config()
        recipe = self.recipe
        vocab = ids if len(ids) < config.vocab_size else None
        sizes = (recipe.heads, recipe.head_layers, config.hidden_size, config.vocab_size)
        heads = start.float() if start else MedusaHeads(*sizes, vocab, shares_output=not recipe.own_output)
        matrix = self._output_rows(ids)
        if recipe.own_output and not start:
            with torch.no_grad():
                for head in heads.heads:
                    head[-1].weight.copy_(matrix)  # type: ignore[index]
        facts = self._fit(MedusaTraining(heads, None if recipe.own_output else matrix), split)
        heads.accuracies = tuple(map(tuple, facts["table"]))
        self._save(lambda: save_medusa(heads.to(torch.bfloat16), self.folder, target_facts(self.model)))
        return facts

    def _eagle(self, split: Split, ids: Tensor, start: EagleCell | None) -> Facts:
        if start:
            cell = start.float()
            share_output(cell, self.model)
        else:
            cell = EagleCell(EagleConfig.for_target(self.model.config, len(ids)), ids)
            if not warm_start(cell, self.model):
                self.say(
                    "the target's last layer does not fit the cell: attention or its feed-forward part starts at random"
                )
        cell.lm_head.weight.requires_grad_(self.recipe.own_output)
        facts = self._fit(EagleTraining(cell, embedding_table(self.model), self.recipe.steps), split)
        # The target's own output matrix need not be stored again.
        shares = not self.recipe.own_output
        self._save(lambda: save_eagle(cell.to(torch.bfloat16), self.folder, target_facts(self.model), shares))
        return facts

    def _draft(self, split: Split) -> Facts:
        small = self._started_draft() if self.recipe.start_from else pruned(self.model, self.recipe.layers).float()
        facts = self._fit(DraftTraining(small), split)
        self._save(lambda: small.to(self.model.dtype).save_pretrained(self.folder))
        return facts

    def _recycling(self, split: Split) -> Facts:
        vocab_size = self.model.config.get_text_config().vocab_size
        table = gather(self.store, split.train, vocab_size, self.recipe.contexts, target_facts(self.model))
        self._save(lambda: table.save(self.folder))
        accuracy = judge(table, self.store, split.held_out)
        hits = ", ".join(f"{name} {rates[0]:.3f}" for name, rates in accuracy.items())
        self.say(f"{table.num_contexts} contexts; on held-out text {hits}")
        return {"num_contexts": table.num_contexts, **accuracy}

    def _started_draft(self) -> Any:
        small = load_model(str(self.recipe.start_from), dtype="float32", device=str(self.model.device))
        sizes = [each.config.get_text_config().vocab_size for each in (small, self.model)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(f"{self.recipe.start_from} has {sizes[0]} token ids and the target {sizes[1]}")
        return small

    def _save(self, write: Callable[[], object]) -> None:
        from accelerate import PartialState

        if PartialState().is_main_process:
            write()

    def _output_rows(self, ids: Tensor) -> Tensor:
        matrix: Tensor = self.model.get_output_embeddings().weight.detach()
        return matrix[ids.to(matrix.device)].float()

    def save_card(self, target: str, licence: str, facts: Mapping[str, Any]) -> None:
        """Write what the drafter was trained on and how good it is, for readers (README.md) and programs."""
        facts = {key: value for key, value in facts.items() if key != "table"}
        recipe = asdict(self.recipe)
        write_json(self.folder / "training.json", {"target": target, "recipe": recipe, "facts": facts})
        write_text(self.folder / "README.md", model_card(target, licence, self.recipe, facts))


def write_ids(file: Path, ids: Tensor) -> None:
    """Keep a draft vocabulary (Vd,) for the run's next start."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"ids": ids.tolist()})


def usage(kind: str, folder: object) -> str:
    """The options of the command line that use what was trained, quoted for a shell."""
    if kind == "draft":
        return f"--drafter model --drafter-model {shlex.quote(str(folder))}"
    return f"--drafter {shlex.quote(trained_drafter(kind, folder))}"


def trained_drafter(kind: str, folder: object) -> str:
    """The drafter in ``folder`` as it is named, for all kinds but draft models."""
    return format_drafter(kind, {"start" if kind == "recycling" else "path": str(folder)})


@torch.no_grad()
def embedding_table(model: Any) -> Tensor:
    """(V, H) what the model's embedding layer gives for each id: some scale their weights."""
    layer = model.get_input_embeddings()
    table: Tensor = layer(torch.arange(len(layer.weight), device=layer.weight.device))
    return table.float()


def _how(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """A model card's line on how the drafter was made."""
    if recipe.kind == "recycling":
        return (
            f"- Nothing was fitted: the target's own next-token probabilities, averaged for the\n  {facts['num_contexts']} "
            "contexts of 1 to 3 tokens that occur most often there."
        )
    return (
        f"- Training: {facts['step']} steps of {recipe.batch_tokens} tokens, {facts['elapsed_s'] / 60:.0f} minutes\n  "
        f"({facts['epoch'] + 1} passes over the data)."
    )


def model_card(target: str, licence: str, recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """The text of a model card."""
    names = {
        "medusa": "Medusa heads",
        "eagle": "EAGLE-3 draft head",
        "draft": "Distilled draft model",
        "recycling": "Start table of Token Recycling",
    }
    places = "head" if recipe.kind == "medusa" else "step ahead"
    rows = zip(facts["top1"], facts["top4"], facts["top8"], strict=True)
    table = "\n".join(f"| {i + 1} | {a:.3f} | {b:.3f} | {c:.3f} |" for i, (a, b, c) in enumerate(rows))
    vocabulary = (
        f"- Draft vocabulary: {facts['draft_vocab_size']} ids, {100 * facts['coverage']:.1f} % of held-out choices.\n"
        if "coverage" in facts
        else ""
    )
    start = f"- Began as {Path(recipe.start_from).name}, trained before.\n" if recipe.start_from else ""
    return f"""---
license: {licence}
base_model: {target}
tags: [speculative-decoding]
---
# {names[recipe.kind]} for {target}

Trained with `specdec train {recipe.kind}`; use it with `specdec generate {usage(recipe.kind, "THIS_FOLDER")}`. Output
stays exactly the target's: a drafter only changes how fast it comes.

- Data: {facts["conversations"]} conversations ({facts["num_train_tokens"]} training tokens), written and answered by the
  target itself. No data set was used.
{_how(recipe, facts)}
{start}{vocabulary}- Mean acceptance length on held-out questions, greedy: {facts["mean_acceptance_length"]:.2f}.
- Licence: {licence}, the target's.

How often the target's choice is the draft's best, or among its best 4 or 8, on held-out text:

| {places} | top-1 | top-4 | top-8 |
| --- | --- | --- | --- |
{table}
"""
