"""How many blocks fit into the memory that keys and values may take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from specdec.engine.causal_lm import CausalLM
from specdec.paging.pool import BlockPool
from specdec.paging.prefixes import PrefixTree
from specdec.paging.tables import BlockTables

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SHARE, _MOST = 0.25, 4 * 10**9  # of what is free, and bytes


def make_tables(models: Sequence[Any], memory: int | str | None, block_size: int, prefix_sharing: bool) -> BlockTables:
    """Tables for a pool of as many blocks as ``memory`` holds of the keys and values of all ``models``.

    Raises:
        ValueError: it holds no block, or is no amount of memory.
    """
    per_block = block_size * sum(bytes_per_token(model) for model in models)
    wanted = _available(CausalLM(models[0]).device) if memory is None else parse_memory(memory)
    if wanted < per_block:
        raise ValueError(
            f"kv_memory must hold at least a block of {block_size} tokens, {per_block} bytes, got {memory!r}"
        )
    pool = BlockPool(wanted // per_block, block_size)
    return BlockTables(pool, PrefixTree(pool) if prefix_sharing else None)


def bytes_per_token(model: Any) -> int:
    """What a token's keys and values take in all layers, as the model really makes them."""
    return CausalLM(model).kv_bytes_per_token()


def parse_memory(memory: int | str) -> int:
    """Bytes, from a number or text such as "512MB" or "2 GiB".

    Raises:
        ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(memory))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(f"kv_memory must be a number of bytes or text such as '512MB' or '2GB', got {memory!r}")
    return int(float(match[1]) * unit)


def _available(device: torch.device) -> int:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return min(int(free * _SHARE), _MOST)
