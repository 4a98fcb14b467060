"""Medusa heads (Cai et al., 2024): networks and checkpoints. Head i predicts the token i + 2 places after its state's.

A head is ``num_layers`` residual blocks x + SiLU(W x + b) over the target's last hidden state (the input of its output
matrix), then an output matrix of its own or the target's. Letters: V target vocabulary, Vd draft vocabulary, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.cpu.packed_linear import PackedLinear, PackedSlice, pack, plain_weight
from specdec.drafters.heads.checkpoint_io import (
    CONFIG,
    TensorFiles,
    check_tensors,
    check_vocab,
    read_json,
    save_tensors,
)
from specdec.drafters.trees.shapes import StaticShape
from specdec.errors import CheckpointError

WEIGHTS = "medusa_lm_head.safetensors"
_NAMES = (WEIGHTS, "medusa_lm_head.pt")
_PREFIX = "medusa_head."  # before the heads' keys in a full checkpoint (Medusa-2)
_KEY = re.compile(r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
_VOCAB = "draft_vocab"


class ResBlock(nn.Module):
    """x + SiLU(W x + b); starts as the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class MedusaHeads(nn.Module):
    """All heads of one target.

    Args:
        num_heads: how many tokens ahead.
        num_layers: residual blocks of each head.
        hidden_size: H of the target.
        vocab_size: V of the target.
        draft_vocab: (Vd,) target ids that the rows of the logits stand for; None: all.
        shares_output: use the target's output matrix instead of a Linear of each head's own.
    """

    draft_vocab: Tensor | None

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        draft_vocab: Tensor | None = None,
        shares_output: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or num_layers < (1 if shares_output else 0):
            raise ValueError(
                f"Medusa needs a head, and a layer in heads without an output matrix, got {num_heads} of {num_layers}"
            )
        self.num_heads, self.num_layers = num_heads, num_layers
        self.hidden_size, self.vocab_size, self.shares_output = hidden_size, vocab_size, shares_output
        self.register_buffer(_VOCAB, None if draft_vocab is None else draft_vocab.long())
        self.heads = nn.ModuleList(self._head() for _ in range(num_heads))
        self.first: PackedLinear | None = None  # the first linear layers of all heads, where they are packed
        self.choices: tuple[tuple[int, ...], ...] = ()  # the static tree as paths of ranks, if one was measured
        self.accuracies: tuple[tuple[float, ...], ...] = ()  # (heads, ranks) how often each rank is the token

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size if self.draft_vocab is None else len(self.draft_vocab)

    def _head(self) -> nn.Sequential:
        blocks: list[nn.Module] = [ResBlock(self.hidden_size) for _ in range(self.num_layers)]
        if not self.shares_output:
            blocks.append(nn.Linear(self.hidden_size, self.draft_vocab_size, bias=False))
        return nn.Sequential(*blocks)

    def states(self, hidden: Tensor) -> Tensor:
        """The target's states (..., H) after each head's residual blocks: (heads, ..., H)."""
        blocks = [list(head.children())[: self.num_layers] for head in self.heads]
        if self.first is None:
            return torch.stack([_through(block, hidden) for block in blocks])
        inner = self.first(hidden).unflatten(-1, (self.num_heads, -1))
        states = hidden.unsqueeze(-2) + nn.functional.silu(inner)
        return torch.stack([_through(block[1:], x) for block, x in zip(blocks, states.unbind(-2), strict=True)])

    def forward(self, hidden: Tensor, output_weight: Tensor | None = None) -> Tensor:
        """Logits (heads, ..., Vd) at the target's states ``hidden`` (..., H).

        ``output_weight`` (V or Vd, H) is the target's output matrix, or its rows of the draft vocabulary: needed, and
        used, only if ``shares_output``.
        """
        if not self.shares_output:
            outputs = [list(head.children())[-1] for head in self.heads]
            return torch.stack([output(x) for output, x in zip(outputs, self.states(hidden), strict=True)])
        if output_weight is None:
            raise ValueError("these heads share the target's output matrix: pass output_weight")
        if self.draft_vocab is not None and output_weight.shape[0] == self.vocab_size:
            output_weight = output_weight[self.draft_vocab]
        return self.states(hidden) @ output_weight.T

    def target_ids(self) -> Tensor:
        """(Vd,) the target's token id of each row of the logits."""
        if self.draft_vocab is not None:
            return self.draft_vocab
        return torch.arange(self.vocab_size, device=next(self.parameters()).device)


def _through(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def pack_heads(heads: MedusaHeads) -> None:
    """Pack the linear layers of ``heads``, in place: for inference on a CPU. The first ones of all become one product."""
    blocks: list[Any] = [next(head.children()) for head in heads.heads] if heads.num_layers else []
    layers = [block.linear for block in blocks]
    if layers and all(plain_weight(layer) is not None for layer in layers):
        weights, biases = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias"))
        heads.first = PackedLinear(torch.cat(weights), torch.cat(biases))
        for i, block in enumerate(blocks):
            block.linear = PackedSlice(heads.first, i * heads.hidden_size, heads.hidden_size)
    pack(heads)


def save_medusa(heads: MedusaHeads, path: str | Path, base: Mapping[str, Any] | None = None) -> None:
    """Write a folder in FasterDecoding's v0.1 key layout, atomically; ``base`` are facts about the target.

    Heads that share the target's output matrix have no ``{i}.{L}.weight``, like the first published ones.
    """
    tensors = {key.removeprefix("heads."): value for key, value in heads.state_dict().items()}
    config = {
        "architectures": ["MedusaHeads"],
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "draft_vocab_size": heads.draft_vocab_size,
        "shares_output": heads.shares_output,
        "choices": [list(choice) for choice in heads.choices],
        "accuracies": [list(row) for row in heads.accuracies],
        "specdec_target": dict(base or {}),
    }
    save_tensors(tensors, config, Path(path), WEIGHTS)


def load_medusa(path: str | Path, hidden_size: int, vocab_size: int) -> MedusaHeads:
    """Heads from a file or folder: our own, FasterDecoding's v0.1 and older ones, or a full Medusa-2 checkpoint.

    How many heads and layers there are, and whether they own output matrices, is read from the keys: published
    configs are often wrong.

    Raises:
        CheckpointError: a key is missing or unknown, or a shape does not fit a target of these sizes.
    """
    path = Path(path)
    files = TensorFiles(path, _NAMES)
    nested = [key for key in files.keys if key.startswith(_PREFIX)]
    if not nested and not any(_KEY.fullmatch(key) for key in files.keys):
        raise CheckpointError(
            f"{path} holds no Medusa heads: keys such as 0.0.linear.weight, or {_PREFIX}0.0.linear.weight"
        )
    read = files.read(nested or files.keys)
    tensors = {key.removeprefix(_PREFIX): value for key, value in read.items()}
    vocab = tensors.get(_VOCAB)
    if vocab is not None:
        check_vocab(vocab, vocab_size, f"{_VOCAB} in {path}")
    keys = [match.groups() for key in tensors if (match := _KEY.fullmatch(key))]
    num_heads = len({head for head, _, _ in keys})
    num_layers = len({layer for _, layer, kind in keys if kind != "weight"})
    owns = any(kind == "weight" for _, _, kind in keys)
    heads = MedusaHeads(num_heads, num_layers, hidden_size, vocab_size, vocab, shares_output=not owns)
    state = {key.removeprefix("heads."): value for key, value in heads.state_dict().items()}
    check_tensors(tensors, {key: tuple(value.shape) for key, value in state.items()}, path)
    heads.load_state_dict({key if key == _VOCAB else f"heads.{key}": value for key, value in tensors.items()})
    _read_config(heads, (path if path.is_dir() else path.parent) / CONFIG)
    return heads


def _read_config(heads: MedusaHeads, file: Path) -> None:
    """What our own configs say beyond the keys."""
    config = read_json(file) if file.is_file() else {}
    try:
        shape = StaticShape(tuple(sorted((tuple(c) for c in config.get("choices", ())), key=lambda c: (len(c), c))))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the choices in {file} are no tree: {error}") from None
    heads.choices = shape.paths
    try:
        heads.accuracies = tuple(tuple(map(float, row)) for row in config.get("accuracies", ()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the accuracies in {file} are no table of rates: {error}") from None
