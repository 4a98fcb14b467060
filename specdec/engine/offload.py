"""Models whose weights lie elsewhere between calls: accelerate's offloading leaves them on ``meta`` and loads each
module's when it runs. Whatever reads a weight, or asks where a model computes, does so here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from specdec.errors import UnsupportedModelError


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of ``model`` are loaded only for the time of a call."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def loaded(module: nn.Module) -> Iterator[Any]:
    """``module`` with its own weights and buffers in memory, on the device where it computes.

    Raises:
        UnsupportedModelError: they are on ``meta`` and nothing loads them.
    """
    if not _own_meta(module):
        yield module
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        if _own_meta(module):
            raise UnsupportedModelError(
                f"the weights of {type(module).__name__} are on the meta device, and nothing there loads them for a "
                "call: load the model with from_pretrained, or offload it with accelerate"
            )
        yield module


def input_device(model: Any) -> torch.device:
    """Where ``model`` takes its token ids: the device on which its embeddings are looked up.

    Raises:
        UnsupportedModelError: the weights are on ``meta`` and nothing loads them.
    """
    with loaded(model.get_input_embeddings()) as embeddings:
        return embeddings.weight.device  # type: ignore[no-any-return]


def _own_meta(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.is_meta for tensor in own)
