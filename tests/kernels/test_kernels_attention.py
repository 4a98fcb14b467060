"""Tree attention: tensor-core and float32 kernels against the float64 twin, under several thread schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import ancestors, each_schedule, kernel_cache, random_parents, simulated  # noqa: F401
from simulator import schedule
from torch import Tensor

from specdec.kernels.attention import (
    KVView,
    TreeMask,
    pack_mask,
    tree_attention,
    tree_attention_torch,
    visible_slots,
)

pytestmark = pytest.mark.usefixtures("simulated")
# Relative error in the Euclidean norm: the rounding of weights and results to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    """One call: a row for each kept length, random trees, garbage where nothing may be read."""

    size: int = 64
    dtype: torch.dtype = torch.float16
    lengths: tuple[int, ...] = (50, 600)
    nodes: int = 13
    heads: int = 4
    kv_heads: int = 2
    page: int = 0  # slots a page, 0: dense
    seed: int = 0

    def inputs(self) -> tuple[Tensor, KVView, TreeMask]:
        generator = torch.Generator().manual_seed(self.seed)
        rows, capacity = len(self.lengths), -(-(max(self.lengths) + self.nodes + 3) // 64) * 64
        query = torch.randn(rows, self.nodes, self.heads, self.size, generator=generator).to(self.dtype)
        shape = (rows, self.kv_heads, capacity, self.size)
        pages = torch.arange(rows)[:, None]
        if self.page:
            each = capacity // self.page
            shape = (rows * each + 3, self.kv_heads, self.page, self.size)
            pages = torch.randperm(shape[0], generator=generator)[: rows * each].view(rows, each)
        keys, values = (torch.randn(shape, generator=generator).to(self.dtype) for _ in range(2))
        seen = torch.stack([ancestors(random_parents(self.nodes, row)) for row in range(rows)])
        depths = (seen.sum(2) - 1).int()
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        mask = TreeMask(lengths, pack_mask(seen), self.nodes, depths, depths)
        return query, KVView(keys, values, pages.int()), mask


def spoil_unused(kv: KVView, mask: TreeMask) -> None:
    """NaN behind each row's area: what is read there shows."""
    page = kv.keys.shape[2]
    for row, length in enumerate(mask.lengths.tolist()):
        for slot in range(length + mask.area, kv.pages.shape[1] * page):
            kv.keys[kv.pages[row, slot // page], :, slot % page] = math.nan
            kv.values[kv.pages[row, slot // page], :, slot % page] = math.nan


def assert_right(case: Case, seed: int, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None) -> None:
    query, kv, mask = case.inputs()
    spoil_unused(kv, mask)
    scale = 1 / math.sqrt(case.size)
    with schedule(seed):
        got = tree_attention(query, kv, mask, scale, window, softcap, sinks)
    expected = tree_attention_torch(query.double(), kv, mask, scale, window, softcap, sinks)
    assert got.dtype == query.dtype
    assert float((got.double() - expected).norm() / expected.norm()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(nodes=1, lengths=(0, 1)),
        Case(nodes=130, heads=2, kv_heads=1, lengths=(77,)),
        Case(size=80, dtype=torch.bfloat16, heads=3, kv_heads=1),
        Case(size=96, heads=2, kv_heads=2, lengths=(64, 256, 257)),
        Case(size=128, dtype=torch.bfloat16, nodes=64, heads=8, lengths=(200,)),
        Case(size=256, heads=2, kv_heads=1, nodes=70, lengths=(300,)),
        Case(page=16),
        Case(size=128, dtype=torch.bfloat16, page=64),
        Case(dtype=torch.float32),
        Case(dtype=torch.float32, size=80, nodes=40, page=32, lengths=(5, 300)),
        Case(dtype=torch.float32, size=256, lengths=(31,), nodes=3),
    ],
    ids=str,
)
@each_schedule
def test_attention_is_the_twins(case: Case, seed: int) -> None:
    assert_right(case, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_schedule
def test_windows_caps_and_sinks_are_the_twins(dtype: torch.dtype, seed: int) -> None:
    """A window smaller than a tile, one that cuts off whole splits, and one longer than the text."""
    case = Case(dtype=dtype, lengths=(0, 40, 1000), nodes=20)
    sinks = torch.tensor([0.0, 3.0, -2.0, 8.0])
    for window in (5, 300, 5000):
        assert_right(case, seed, window=window)
    assert_right(case, seed, softcap=3.0)
    assert_right(case, seed, sinks=sinks)
    assert_right(case, seed, window=100, softcap=20.0, sinks=sinks)


def test_many_splits_are_the_twins() -> None:
    """4 to 16 splits, of which shorter rows use few."""
    assert_right(Case(lengths=(5000, 1025, 10), nodes=5), 0)


def test_queries_may_be_a_part_of_the_area() -> None:
    """Nodes that were scored before stand in the area without being asked for again."""
    query, kv, mask = Case(nodes=30).inputs()
    full = tree_attention(query, kv, mask, 0.125)
    assert mask.query_depths is not None
    part = replace(mask, bits=mask.bits[:, 20:].contiguous(), query_depths=mask.query_depths[:, 20:].contiguous())
    assert torch.equal(tree_attention(query[:, 20:], kv, part, 0.125), full[:, 20:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nodes_result_does_not_depend_on_its_tree_or_batch(dtype: torch.dtype) -> None:
    """Bit for bit: the root alone, in a tree of 100, and beside other rows; splits follow from the length alone."""
    case = Case(dtype=dtype, lengths=(1100,), nodes=100)
    query, kv, mask = case.inputs()
    full = tree_attention(query, kv, mask, 0.125)
    for count in (1, 7):
        few = TreeMask(mask.lengths, mask.bits[:, :count].contiguous(), count)
        assert torch.equal(tree_attention(query[:, :count], kv, few, 0.125), full[:, :count])
    two = KVView(*(torch.cat([t, torch.randn_like(t)]) for t in (kv.keys, kv.values)), torch.tensor([[0], [1]]).int())
    both = TreeMask(torch.tensor([1100, 30], dtype=torch.int32), mask.bits.repeat(2, 1, 1), 100)
    assert torch.equal(tree_attention(query.repeat(2, 1, 1, 1), two, both, 0.125)[:1], full)


def test_transposed_queries_need_no_copy() -> None:
    query, kv, mask = Case().inputs()
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    assert torch.equal(tree_attention(turned, kv, mask, 0.125), tree_attention(query, kv, mask, 0.125))


def test_the_twin_is_plain_softmax_attention() -> None:
    query, kv, mask = Case(dtype=torch.float32, heads=2, lengths=(20, 30)).inputs()
    visible = visible_slots(mask, kv.keys.shape[2])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), kv.keys, kv.values, attn_mask=visible[:, None], scale=0.2
    )
    torch.testing.assert_close(tree_attention_torch(query, kv, mask, 0.2), expected.transpose(1, 2))


def test_wrong_arguments_of_tree_attention_are_named() -> None:
    query, kv, mask = Case().inputs()
    with pytest.raises(ValueError, match="3 query heads of size 64 do not fit 2"):
        tree_attention(query[:, :, :3], kv, mask, 1.0)
    with pytest.raises(ValueError, match="needs query_depths"):
        tree_attention(query, kv, TreeMask(mask.lengths, mask.bits, 13), 1.0, window=3)
    with pytest.raises(ValueError, match="the area must have 1 to 64 slots, got 65"):
        tree_attention(query, kv, replace(mask, area=65), 1.0)
    with pytest.raises(ValueError, match="power of two"):
        tree_attention(query, KVView(kv.keys[:, :, :48], kv.values[:, :, :48], kv.pages.repeat(1, 2)), mask, 1.0)
    with pytest.raises(ValueError, match="contiguous heads"):
        tree_attention(query.transpose(1, 3).contiguous().transpose(1, 3), kv, mask, 1.0)
