"""A reduced draft vocabulary: the token ids that a target uses most, and what share of its choices they cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdec.drafters.heads.checkpoint_io import check_vocab, read_json
from specdec.drafters.training.features import FeatureStore
from specdec.drafters.training.job import Facts, Job
from specdec.errors import CheckpointError
from specdec.records.files import write_json

_FILE = "draft_vocab.json"


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """Target ids in rising order, and the share of held-out positions whose most probable token is among them."""

    ids: Tensor  # (Vd,)
    coverage: float


def choose_vocabulary(
    store: FeatureStore,
    train: Sequence[int],
    held_out: Sequence[int],
    vocab_size: int,
    size: int,
    fixed_ids: Tensor | None = None,
) -> DraftVocabulary:
    """The ``size`` ids with the most probability mass under the target's choices on ``train`` shards.

    Among ids that were never seen the lower ones are taken: tokenizers number common tokens first. ``fixed_ids`` ids
    (Vd,), if they are ``size`` many, are taken as they are.

    Raises:
        ValueError: ``size`` is not in [1, vocab_size].
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(f"a draft vocabulary must have 1 to {vocab_size} (the target's) ids, got {size}")
    ids = _most_used(store, train, vocab_size, size) if fixed_ids is None or len(fixed_ids) != size else fixed_ids
    kept = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    best = torch.cat([text.top_ids[:, 0] for shard in held_out for text in store.read(shard)])
    return DraftVocabulary(ids, float(kept[best].double().mean()))


def _most_used(store: FeatureStore, shards: Sequence[int], vocab_size: int, size: int) -> Tensor:
    mass = torch.zeros(vocab_size, dtype=torch.float64)
    for shard in shards:
        for text in store.read(shard):
            mass.index_add_(0, text.top_ids.flatten(), text.top_logprobs.flatten().double().exp())
    mass -= torch.arange(vocab_size, dtype=torch.float64) * 1e-12
    return mass.topk(size).indices.sort().values


def draft_vocabulary(job: Job, size: int, start_ids: Tensor | None) -> tuple[Tensor, Facts]:
    """The ids (Vd,) that a run's head drafts, and facts about them.

    Chosen when the run begins, because the rows of its output matrices stand for these ids whatever text is added
    later; ``size`` 0 is every id. A head that is trained further keeps its ``start_ids`` (Vd,).
    """
    vocab_size = job.model.config.get_text_config().vocab_size
    file, size, ids = job.folder / "run" / _FILE, size or vocab_size, start_ids
    if ids is not None:
        size = len(ids)
    elif file.exists():
        ids = torch.tensor(read_json(file).get("ids", []))
        check_vocab(ids, vocab_size, str(file))
    chosen = choose_vocabulary(job.store, job.split.train, job.split.held_out, vocab_size, size, ids)
    if ids is None:
        job.save(lambda: _write_ids(file, chosen.ids))
    covered = f"which cover {100 * chosen.coverage:.1f} % of held-out choices"
    job.say(f"draft vocabulary: {len(chosen.ids)} ids, {covered}")
    return chosen.ids, {"draft_vocab_size": len(chosen.ids), "coverage": round(chosen.coverage, 4)}


def check_output(path: Path, shares: bool, own_output: bool) -> None:
    """Whether the head at ``path``, which ``shares`` the target's output matrix or not, fits a recipe's ``own_output``.

    Raises:
        CheckpointError: it does not.
    """
    if shares == own_output:
        advice = "shares the target's output matrix: leave --own-output out" if shares else "has its own: --own-output"
        raise CheckpointError(f"{path} {advice}")


def _write_ids(file: Path, ids: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"ids": ids.tolist()})
