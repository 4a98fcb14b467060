"""What calls of ``generate()`` leave behind for the next ones: the keys and values of their texts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import nn

from specdec.checks import whole_number
from specdec.engine.kv_memory import make_tables, parse_memory
from specdec.engine.weight_watch import WeightWatch
from specdec.paging.prefixes import PrefixTree
from specdec.paging.tables import BlockTables
from specdec.runtime import Runtime

Kept = TypeVar("Kept")


class PrefixCache:
    """For ``specdec.generate(..., prefix_cache=cache)``: prompts that begin like an earlier text are not computed again.

    It belongs to the model of the first call. Answers count as well, so a second turn of a chat processes only what is
    new. Calls that share a cache run one after the other. When weights change, what is known is dropped; changes that
    are not seen (docs/models.md) need ``clear()``.

    Args:
        memory: for keys and values of the target and its draft models, in bytes or as "2GB"; None: a quarter of what is
            free, at most 4 GB. A call whose texts do not fit raises OutOfBlocksError.
        block_size: tokens of a block.

    Raises:
        ValueError: no amount of memory, or a block without tokens.
    """

    def __init__(self, memory: int | str | None = None, block_size: int = 16) -> None:
        if whole_number("block_size", block_size) < 1:
            raise ValueError(f"block_size must be 1 or more, got {block_size}")
        if memory is not None:
            parse_memory(memory)
        self.memory, self.block_size = memory, block_size
        self.lock = RLock()
        self._model: Any = None
        self._made_for: Hashable = None
        self._watch: WeightWatch | None = None
        self._runtime: Runtime | None = None
        self._tables: BlockTables | None = None
        self._kept: dict[Hashable, Any] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return self._tree.num_tokens if self._tables else 0

    def clear(self) -> None:
        """Forget all texts, and free the memory."""
        with self.lock:
            self._made_for = self._watch = self._runtime = self._tables = None
            self._kept.clear()

    def runtime(self, model: Any, draft_models: Sequence[Any], accelerate: bool) -> Runtime:
        """The models as they run here, on what is known.

        Raises:
            ValueError: the cache belongs to another model.
        """
        if self._model is not None and self._model is not model:
            raise ValueError("prefix_cache belongs to another model; make one PrefixCache for each model")
        self._model = model
        made_for = (*map(id, draft_models), accelerate, model.training, torch.is_inference_mode_enabled())
        is_known = self._runtime is not None and made_for == self._made_for
        if not is_known or self._watch is None or not self._watch.is_unchanged():
            self.clear()
            tables = make_tables([model, *draft_models], self.memory, self.block_size, True)
            self._runtime = Runtime(model, draft_models, accelerate=accelerate, tables=tables)
            self._made_for, self._tables, self._watch = made_for, tables, WeightWatch(list(_weighted(model)))
        assert self._runtime is not None
        return self._runtime

    def kept(self, name: Hashable, build: Callable[[], Kept]) -> Kept:
        """What ``build`` makes of drafters, made once for each ``name``: their own keys and values are kept, too."""
        if name not in self._kept:
            self._kept[name] = build()
        made: Kept = self._kept[name]
        return made

    @property
    def _tree(self) -> PrefixTree:
        assert self._tables is not None
        assert self._tables.tree is not None
        return self._tables.tree


def _weighted(model: nn.Module) -> list[nn.Module]:
    """The modules with a weight."""
    return [module for module in model.modules() if "weight" in module._parameters]
