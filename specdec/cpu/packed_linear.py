"""Linear layers laid out once for oneDNN's small-batch kernels.

PyTorch's own float32 path is slow for 2 to 16 rows, which is what verifying a draft needs; with the weights reordered
once the same products take less than half the time (docs/log.md). The operators are private to PyTorch (its compiler
emits them), so they are tried before use (:func:`packing_fault`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from specdec.engine.shared_copy import is_changed, replaceable
from specdec.engine.weight_watch import WeightWatch

MIN_SIZE = 64  # smaller layers gain nothing
_ROWS_HINT = 16  # rows of a typical verification pass


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's own layout; for inference only.

    Computed in the dtype of W. Under ``torch.autocast`` y has that one's dtype, as with a plain layer.

    Code that looks at ``weight`` gets that of the layer in whose place this one stands, while that layer lives, and may
    write to it in the midst of a pass, as a merged adapter does that is switched off. From then on it is looked whether
    it did; if so, that layer itself runs.
    """

    _replaced: Callable[[], Any]
    _watch: WeightWatch | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
        self.bias = None if bias is None else bias.detach()
        self._replaced, self._is_transposed, self._watch = _none, False, None

    @classmethod
    def of(cls, layer: Any) -> PackedLinear:
        """To stand in the place of ``layer``, which has a ``plain_weight``."""
        weight = plain_weight(layer)
        assert weight is not None
        packed = cls(weight, layer.bias)
        packed._replaced, packed._is_transposed = ref(layer), weight is not layer.weight
        return packed

    @property
    def weight(self) -> Tensor:
        """That of the replaced layer, or a copy in its shape if it is gone."""
        layer = self._replaced()
        if layer is None:
            plain: Tensor = self.packed.to_dense()
            return plain.t() if self._is_transposed else plain
        if self._watch is None:
            self._watch = WeightWatch([layer])
        return layer.weight  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self._watch is not None and (layer := self._rewritten(self._watch)) is not None:
            return layer(x)  # type: ignore[no-any-return]
        if x.dtype is not self.dtype:
            x = x.to(self.dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        if torch.is_autocast_enabled("cpu"):
            y = y.to(torch.get_autocast_dtype("cpu"))
        if y.requires_grad:
            _refuse_gradients(y)
        return y

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """``forward(x) + other``; in 16 bits rounded twice, as two separate operators round."""
        if self.dtype is not torch.float32 or other.dtype is not torch.float32 or self._watch is not None:
            return self.forward(x) + other
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x.to(self.dtype), other, self.packed, self.bias, "add")
        if y.requires_grad:
            _refuse_gradients(y)
        return y

    def _rewritten(self, watch: WeightWatch) -> Any:
        """The replaced layer, if its weight is no longer what was packed."""
        layer = self._replaced()
        return None if layer is None or watch.is_unchanged() else layer

    def __getstate__(self) -> Any:
        raise TypeError(
            "packed layers can be neither copied nor saved; copy or save the model before it is accelerated"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        wanted = fn(torch.empty(0, dtype=self.dtype))
        if wanted.dtype is not self.dtype or wanted.device.type != "cpu":
            raise TypeError(
                f"packed layers stay {self.dtype} on the CPU and cannot become {wanted.dtype} on {wanted.device}; the "
                "model is now partly converted: load it anew and convert it before it is accelerated"
            )
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        self.__getstate__()  # a file without these weights would look like a whole one


def _none() -> None:
    """A reference to nothing."""


def _refuse_gradients(y: Tensor) -> None:
    """Let no gradient pass through ``y`` without a word."""
    y.register_hook(_refuse)  # type: ignore[no-untyped-call]


def _refuse(_: Tensor) -> None:
    raise TypeError("packed layers have no gradients; train the model before it is accelerated, or a copy that is not")


class PackedSlice(nn.Module):
    """Some outputs of a packed layer, in the place of the layer that they came from."""

    def __init__(self, whole: PackedLinear, start: int, size: int) -> None:
        super().__init__()
        self.whole, self.start = whole, start
        self.out_features, self.in_features = size, whole.in_features

    @property
    def weight(self) -> Tensor:
        """A plain copy (out, in)."""
        return self.whole.weight[self.start : self.start + self.out_features]

    @property
    def bias(self) -> Tensor | None:
        bias = self.whole.bias
        return None if bias is None else bias[self.start : self.start + self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.whole(x).narrow(-1, self.start, self.out_features)
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
        with torch.autocast("cpu", enabled=False):
            weight, x = torch.randn(96, 64, dtype=dtype), torch.randn(2, 3, 64, dtype=dtype)
            other = torch.randn(2, 3, 96, dtype=dtype)
            expected = nn.functional.linear(x, weight)
            packed = PackedLinear(weight, None)
            error = torch.maximum(
                (packed(x) - expected).abs().max(), (packed.plus(x, other) - expected - other).abs().max()
            )
    except (RuntimeError, AttributeError, NotImplementedError) as failure:
        return f"PyTorch's packed linear layers do not work here: {str(failure).splitlines()[0]}"
    return "" if float(error) < 0.5 else f"PyTorch's packed linear layers are wrong here by {float(error)}"


def is_packed(model: nn.Module) -> bool:
    """Whether a part of ``model`` runs on packed layers."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def pack(model: nn.Module) -> None:
    """Replace the linear layers below ``model`` that can be packed, but for those that a copy shares."""
    for parent in list(replaceable(model)):
        for name, child in list(parent.named_children()):
            if plain_weight(child) is not None:
                setattr(parent, name, PackedLinear.of(child))


def packable(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model`` that can be packed."""
    return [module for module in model.modules() if plain_weight(module) is not None]


def plain_weight(layer: nn.Module) -> Tensor | None:
    """(out, in) of a linear layer (or GPT-2's transposed one) that can be packed; None for anything else."""
    is_linear = type(layer) is nn.Linear
    if (not is_linear and type(layer).__name__ != "Conv1D") or is_changed(layer):
        return None
    weight = layer.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu":  # quantised ones have their own class
        return None
    if min(weight.shape) < MIN_SIZE or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    return weight if is_linear else weight.t()
