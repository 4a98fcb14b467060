"""Text and features for ``specdec train``: made by the target where they are missing, kept on disk."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import options
from specdec.cli.text import tell
from specdec.hub.catalog import DEFAULT_MODEL, cache_dir

if TYPE_CHECKING:
    from specdec.drafters.training.data import Conversation, DataFolder
    from specdec.drafters.training.features import FeatureStore
    from specdec.drafters.training.generator import Chat

SELF = "self"  # instead of a file: the target writes the questions
_SHOW_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where the training text comes from.

    Raises:
        ValueError: too few conversations, or a file of questions that cannot be read.
    """

    target: options.Target = DEFAULT_MODEL
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help=f"Questions as JSONL, as for bench; {SELF}: the target writes them itself."),
    ] = SELF
    conversations: Annotated[int, typer.Option(metavar="N", help="How many the target answers.")] = 2000
    max_answer_tokens: Annotated[int, typer.Option(metavar="N", help="The longest answer.")] = 256
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows that are generated at a time.")] = 64
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keeps text and features for other runs; default: in the cache folder."),
    ] = None
    seed: options.Seed = 0
    _texts: tuple[str, ...] = field(init=False)  # of a file's questions

    def __post_init__(self) -> None:
        from specdec.drafters.training.features import SHARD
        from specdec.records.prompts import load_prompts

        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        texts = () if self.data == SELF else tuple(prompt.turns[0] for prompt in load_prompts(self.data))
        object.__setattr__(self, "_texts", texts)
        if self._count < 2 * SHARD:
            where = "" if self.data == SELF else f" (--data {self.data} holds {len(texts)})"
            raise ValueError(f"training needs at least {2 * SHARD} conversations, got {self._count}{where}")

    @property
    def _count(self) -> int:
        return self.conversations if self.data == SELF else min(self.conversations, len(self._texts))

    @property
    def _folder(self) -> Path:
        if self.work is not None:
            return self.work.expanduser()
        source = SELF if self.data == SELF else Path(self.data).stem
        return cache_dir() / "training" / f"{Path(self.target).name}-{source}-{self.seed}"

    def prepare(self, model: Any, tokenizer: Any, *, needs_layers: bool) -> tuple[FeatureStore, list[Conversation]]:
        """Make what is missing of the text and its features; ``needs_layers``: EAGLE's, which small targets lack."""
        from specdec.drafters.heads.eagle_engine import feature_layers
        from specdec.drafters.training.features import SHARD, FeatureStore

        num_layers = model.config.get_text_config().num_hidden_layers
        layers = feature_layers(num_layers) if needs_layers or num_layers > 2 else ()
        texts = self._write(model, tokenizer)
        store = FeatureStore(self._folder / "features", layers)
        whole_shards = texts[: len(texts) // SHARD * SHARD]
        total = sum(min(len(text.tokens), store.max_length) for text in whole_shards)
        progress, num_tokens = Progress("features, tokens"), 0
        for size in store.build(model, texts):
            num_tokens += size
            progress.show(num_tokens, total)
        return store, texts

    def _write(self, model: Any, tokenizer: Any) -> list[Conversation]:
        from specdec.drafters.training.data import DataFolder, DataSettings
        from specdec.drafters.training.generator import Chat

        has_template = bool(getattr(tokenizer, "chat_template", None))
        chat = Chat.of(tokenizer) if self.data == SELF or has_template else Chat.plain(tokenizer)
        digest = SELF if self.data == SELF else hashlib.sha256("\0".join(self._texts).encode()).hexdigest()
        limit = self.max_answer_tokens
        settings = DataSettings(self.target, self._count, digest, self.seed, max_answer_tokens=limit)
        folder = DataFolder(self._folder, settings)
        folder.open()
        if folder.missing():
            self._generate(model, chat, folder)
        return folder.read()

    def _generate(self, model: Any, chat: Chat, folder: DataFolder) -> None:
        from specdec.cli.loading import check_prompt, eos_ids
        from specdec.cpu.accelerate import accelerated
        from specdec.drafters.training.generator import OPENERS, Generator
        from specdec.runtime import Runtime
        from specdec.settings import Settings

        runtime, settings = Runtime(accelerated(model)), folder.settings  # a copy that ends with this function
        asks_itself = self.data == SELF
        openers = [json.loads(line) for line in OPENERS.read_text("utf-8").splitlines()] if asks_itself else []
        questions = None if asks_itself else [chat.encode(text) for text in self._texts]
        for i, question in enumerate(questions or [[0] * settings.max_question_tokens], start=1):
            what = "a conversation" if questions is None else f"question {i} of {self.data}"
            check_prompt(runtime.target, chat.prompt(question), settings.max_answer_tokens, what)
        plain = Settings(drafter="none", adaptive=False, seed=settings.seed)
        make_decoder = partial(runtime.decoder, plain)
        generator = Generator(make_decoder, eos_ids(model), chat, settings, openers, questions, self.batch_size)
        progress, num_there, tokens = Progress("conversations"), settings.count - len(folder.missing()), 0
        for number, text in enumerate(generator.run(folder), start=num_there + 1):
            tokens += text.num_answer
            progress.show(number, settings.count, f"{tokens} answer tokens")


@dataclass(slots=True)
class Progress:
    """A line on the error stream every few seconds; the rate is of what was done since the first line, a second ago or more."""

    what: str
    _started: tuple[float, int] | None = None  # when, and what was done by then
    _shown: float = 0.0

    def show(self, done: int, total: int, more: str = "") -> None:
        now = time.monotonic()
        self._started = self._started or (now, done)
        if now - self._shown < _SHOW_EVERY_S and done < total:
            return
        self._shown = now
        since, first = self._started
        rate = f" ({(done - first) / (now - since):.1f} a second)" if now - since > 1 and done > first else ""
        tell(f"{self.what}: {done} of {total}{', ' + more if more else ''}{rate}")
