"""Faster passes on a CPU: linear layers laid out once for oneDNN's small-batch kernels, and grouped attention.

PyTorch's own float32 path is slow for 2 to 16 rows, which is what verifying a draft needs; with the weights reordered
once the same products take less than half the time (docs/log.md). The operators are private to PyTorch (its compiler
emits them), so they are tried before use, and everything falls back to the plain layers where they are missing.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdec.grouped_attention import NAME as GROUPED

_MIN_SIZE = 64  # smaller layers gain nothing
_ROWS_HINT = 16  # rows of a typical verification pass


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's own layout; for inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
        self.bias = None if bias is None else bias.detach()

    @property
    def weight(self) -> Tensor:
        """A plain copy (out, in): some models look at a layer's weight."""
        plain: Tensor = self.packed.to_dense()
        return plain

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


@cache
def packing_fault(dtype: torch.dtype) -> str:
    """Why weights of ``dtype`` cannot be packed here; empty if they can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"packed layers exist for float32 and bfloat16, not for {dtype}"
    if not torch._C._has_mkldnn:
        return "this PyTorch was built without oneDNN"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 instructions that oneDNN uses"
    try:
        weight, x = torch.randn(96, 64, dtype=dtype), torch.randn(2, 3, 64, dtype=dtype)
        expected = nn.functional.linear(x, weight)
        error = (PackedLinear(weight, None)(x) - expected).abs().max()
    except (RuntimeError, AttributeError, NotImplementedError) as failure:
        return f"PyTorch's packed linear layers do not work here: {str(failure).splitlines()[0]}"
    return "" if float(error) < 0.5 else f"PyTorch's packed linear layers are wrong here by {float(error)}"


_COPIES: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()


def accelerated_copy(model: Any) -> Any:
    """``accelerated(model)``, kept for as long as ``model`` lives and made anew when its weights have changed."""
    state = tuple((id(p), p._version, p.dtype, p.device) for p in model.parameters())
    if _COPIES.get(model, (None, None))[0] != state:
        _COPIES[model] = (state, accelerated(model))
    return _COPIES[model][1]


def accelerated(model: Any, in_place: bool = False) -> Any:
    """``model`` with packed linear layers, and attention that repeats no heads if it ran on ``sdpa``.

    Args:
        model: a transformers model on the CPU; elsewhere, or where packing is impossible, it is returned as it is.
        in_place: replace the layers of ``model`` itself, which then holds one copy of its weights and can no longer
            be trained or saved. Otherwise the model stays untouched and the result shares everything but the linear
            layers with it, which costs a second copy of their weights.
    """
    if model.device.type != "cpu" or packing_fault(model.dtype):
        return model
    if not in_place:
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
    pack(model)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
    return model


def is_accelerated(model: Any) -> bool:
    """Whether ``model`` runs on packed layers."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def pack(module: nn.Module) -> None:
    """Replace the linear layers below ``module``, whose weights must be of a type that can be packed."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            packed = _packed(child)
            if packed is not None:
                setattr(parent, name, packed)


@torch.no_grad()
def _packed(layer: nn.Module) -> PackedLinear | None:
    """The packed form of a plain linear layer (or GPT-2's transposed one); None for anything else."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if type(layer) is nn.Linear:
        plain = weight
    elif type(layer).__name__ == "Conv1D" and isinstance(weight, Tensor):
        plain = weight.t().contiguous()
    else:
        return None
    if plain is None or min(plain.shape) < _MIN_SIZE or plain.dtype not in (torch.float32, torch.bfloat16):
        return None
    return PackedLinear(plain, bias)
