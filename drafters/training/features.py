"""What a target thinks of its training text: hidden states and the best of its next-token distribution, on disk.

One shard holds a number of conversations end to end. Letters: T positions of a shard, H hidden size, F feature size,
K kept tokens of each distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.heads.checkpoint_io import read_json
from specdec.drafters.heads.shipped import mismatch, target_facts
from specdec.drafters.training.data import Conversation
from specdec.engine.hidden_states import HiddenStateHooks
from specdec.errors import CheckpointError
from specdec.records.files import write_file, write_json

TOP = 64
SHARD = 64  # conversations
_FACTS = "features.json"
_COLUMNS = ("tokens", "hidden", "features", "top_ids", "top_logprobs")  # of a shard, beside the sizes


@dataclass(frozen=True, slots=True)
class Text:
    """One conversation with the target's view of it; position t of each tensor stands behind token t."""

    tokens: Tensor  # (T,) int64
    hidden: Tensor  # (T, H) inputs of the output matrix
    features: Tensor  # (T, F), F may be 0
    top_ids: Tensor  # (T, K) int64, the most probable next tokens, best first
    top_logprobs: Tensor  # (T, K) float32 under the whole distribution


@dataclass(slots=True)
class FeatureStore:
    """A folder of shards.

    Args:
        path: the folder.
        layers: entries of ``hidden_states`` whose values are kept side by side as features.
        max_length: longer conversations are cut.
    """

    path: Path
    layers: tuple[int, ...]
    max_length: int = 1024

    def build(self, model: Any, conversations: Sequence[Conversation], batch_tokens: int = 2048) -> Iterator[int]:
        """Make the shards that are missing; yields the number of tokens of each, made or found.

        A shard of the same conversations is kept as it is, so that ``conversations`` may grow between runs.

        Raises:
            ValueError: the folder was made for other layers or another model, a shard in it is damaged, or a conversation
                holds ids that the model has not.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._check(model)
        num_ids = len(model.get_input_embeddings().weight)
        for conversation in conversations:
            if not all(0 <= token < num_ids for token in conversation.tokens):
                raise ValueError(
                    f"conversation {conversation.index} holds token ids that the model ({num_ids}) has not"
                )
        for number, first in enumerate(range(0, len(conversations) - SHARD + 1, SHARD)):
            file = self._shard(number)
            part = [list(c.tokens[: self.max_length]) for c in conversations[first : first + SHARD]]
            if not (file.exists() and self._tokens(number) == [token for text in part for token in text]):
                tensors = self._compute(model, part, batch_tokens)
                write_file(file, partial(save_file, tensors))
            yield sum(map(len, part))

    def __len__(self) -> int:
        """Whole shards in the folder."""
        number = 0
        while self._shard(number).exists():
            number += 1
        return number

    def read(self, number: int) -> list[Text]:
        """The conversations of one shard."""
        sizes, *columns = self._tensors(number, ("sizes", *_COLUMNS))
        if any(len(column) != int(sizes.sum()) for column in columns):
            raise self._damaged(number, "its tensors are not of one length")
        tokens, hidden, features, top_ids, top_logprobs = (torch.split(column, sizes.tolist()) for column in columns)
        return [
            Text(tokens[i].long(), hidden[i], features[i], top_ids[i].long(), top_logprobs[i].float())
            for i in range(len(sizes))
        ]

    def predictions(self, number: int, count: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """Of one shard end to end: the lengths of its texts, tokens (T,), and the ``count`` most probable next tokens.

        These are ids (T, k) and log-probabilities (T, k), k being at most what is kept.
        """
        sizes, tokens, ids, logprobs = self._tensors(number, ("sizes", "tokens", "top_ids", "top_logprobs"))
        lengths: list[int] = sizes.tolist()
        if any(len(column) != sum(lengths) for column in (tokens, ids, logprobs)):
            raise self._damaged(number, "its tensors are not of one length")
        return lengths, tokens.long(), ids[:, :count].long(), logprobs[:, :count].float()

    def sizes(self, number: int) -> list[int]:
        """The lengths of one shard's conversations."""
        sizes: list[int] = self._tensors(number, ("sizes",))[0].tolist()
        return sizes

    def _tokens(self, number: int) -> list[int]:
        tokens: list[int] = self._tensors(number, ("tokens",))[0].tolist()
        return tokens

    def _tensors(self, number: int, names: Sequence[str]) -> list[Tensor]:
        try:
            with safe_open(self._shard(number), "pt") as file:
                return [file.get_tensor(name) for name in names]
        except SafetensorError as error:
            raise self._damaged(number, error) from None

    def _damaged(self, number: int, why: object) -> CheckpointError:
        return CheckpointError(f"{self._shard(number)} is damaged ({why}); delete it, and it is made again")

    def _shard(self, number: int) -> Path:
        return self.path / f"{number:05}.safetensors"

    def _check(self, model: Any) -> None:
        facts = {"layers": list(self.layers), "max_length": self.max_length, **target_facts(model)}
        file = self.path / _FACTS
        if not file.exists():
            write_json(file, facts)
            return
        on_disk = facts | read_json(file)  # older folders have no fingerprint
        wrong = [
            f"{key} {on_disk[key]}, not {facts[key]}" for key in ("layers", "max_length") if on_disk[key] != facts[key]
        ]
        if fault := "; ".join(wrong) or mismatch(on_disk, facts):
            raise ValueError(f"{self.path} holds other features ({fault}); name another folder, or delete this one")

    @torch.no_grad()
    def _compute(self, model: Any, texts: Sequence[list[int]], batch_tokens: int) -> dict[str, Tensor]:
        """The tensors of a shard. Texts of like length share a pass; the padding at their right is seen by nobody."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        results: dict[int, tuple[Tensor, ...]] = {}
        while order:
            size = max(1, batch_tokens // len(texts[order[-1]]))
            chosen, order = order[-size:], order[:-size]
            for i, result in zip(chosen, self._forward(model, [texts[i] for i in chosen]), strict=True):
                results[i] = result
        columns = [torch.cat([results[i][k] for i in range(len(texts))]) for k in range(4)]
        return {
            "sizes": torch.tensor([len(text) for text in texts]),
            "tokens": torch.tensor([token for text in texts for token in text], dtype=torch.int32),
            **dict(zip(_COLUMNS[1:], columns, strict=True)),
        }

    def _forward(self, model: Any, texts: Sequence[list[int]]) -> Iterator[tuple[Tensor, ...]]:
        width = max(map(len, texts))
        device = model.get_input_embeddings().weight.device
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
        with HiddenStateHooks(model, hidden=True, layers=tuple(dict.fromkeys(self.layers))) as capture:
            logits = model(input_ids=ids, use_cache=False).logits
            captured = capture.take(width)
        assert captured.hidden is not None
        kept = capture.pick(captured.features, self.layers) if self.layers else captured.hidden[..., :0]
        for row, text in enumerate(texts):
            n = len(text)
            scores = logits[row, :n].float()
            best = scores.topk(min(TOP, scores.shape[-1]))
            logprobs = best.values - scores.logsumexp(-1, keepdim=True)
            yield (
                captured.hidden[row, :n].to("cpu", torch.bfloat16),
                kept[row, :n].to("cpu", torch.bfloat16),
                best.indices.int().cpu(),
                logprobs.half().cpu(),
            )
