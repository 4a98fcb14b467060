"""Tree attention alone: our kernel against what torch, transformers and FlashInfer offer."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpu_sections.timing import Run, Timed
from specdec.kernels import attention
from specdec.kernels.attention import KVView, TreeMask


def attention_inputs(
    run: Run, nodes: int, context: int, size: int, heads: int, group: int
) -> tuple[Tensor, KVView, TreeMask]:
    query = run.randn(1, nodes, heads, size)
    keys, values = (run.randn(1, heads // group, context + nodes, size) for _ in range(2))
    tree = torch.eye(nodes, dtype=torch.bool, device=run.device)
    tree[:, 0] = True  # a root and its children
    lengths = torch.tensor([context], dtype=torch.int32, device=run.device)
    pages = torch.zeros(1, 1, dtype=torch.int32, device=run.device)
    return query, KVView(keys, values, pages), TreeMask(lengths, attention.pack_mask(tree[None]), nodes)


def cascade(query: Tensor, keys: Tensor, values: Tensor, tree: Tensor, context: int, scale: float) -> Tensor:
    """Prefix without a mask and the tree's own block, merged by their log-sum-exp: the best of plain torch."""
    batch, nodes, heads, size = query.shape
    group = heads // keys.shape[1]
    rows = query.view(batch, nodes, -1, group, size).permute(0, 2, 1, 3, 4).reshape(batch, -1, nodes * group, size)
    if query.is_cuda:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, before_lse = flash(rows, keys[:, :, :context], values[:, :, :context], scale=scale)[:2]
    scores = (rows @ keys[:, :, context:].transpose(2, 3)).float() * scale
    scores = scores.masked_fill(~tree.repeat_interleave(group, 0), -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    behind = (scores - lse).exp().to(query.dtype) @ values[:, :, context:]
    share = torch.sigmoid(before_lse.view(lse.shape).float() - lse)
    merged = (before.float() * share + behind.float() * (1 - share)).to(query.dtype)
    return merged.view(batch, -1, nodes, group, size).permute(0, 2, 1, 3, 4).reshape(query.shape)


def flex(run: Run, query: Tensor, kv: KVView, mask: TreeMask, scale: float) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = attention.visible_slots(mask, kv.keys.shape[2])[0]
    blocks = create_block_mask(
        lambda b, h, q, k: visible[q, k], None, None, query.shape[1], kv.keys.shape[2], device=run.device
    )
    compiled = torch.compile(flex_attention)
    turned = query.transpose(1, 2).contiguous()
    return lambda: compiled(turned, kv.keys, kv.values, block_mask=blocks, scale=scale, enable_gqa=True)


def flash_infer(query: Tensor, kv: KVView, mask: TreeMask, scale: float) -> Callable[[], object]:
    """FlashInfer's prefill for one request with the tree as a custom mask, packed beforehand."""
    import flashinfer

    visible = attention.visible_slots(mask, kv.keys.shape[2])[0]
    packed = flashinfer.quantization.packbits(visible.flatten().contiguous(), bitorder="little")
    options = {"packed_custom_mask": packed, "kv_layout": "HND", "sm_scale": scale}
    return lambda: flashinfer.single_prefill_with_kv_cache(query[0], kv.keys[0], kv.values[0], **options)


def once(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """``make()`` at the first call, which is not timed; what it made at the others."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def others_unavailable(run: Run) -> dict[str, str]:
    """Which baselines cannot be had, and why."""
    if run.is_dry:
        return dict.fromkeys(("flex, compiled", "flashinfer"), "needs a GPU")
    if importlib.util.find_spec("flashinfer") is None:
        return {"flashinfer": "absent: FlashInfer is not installed (pip install flashinfer-python)"}
    return {}


def attentions(run: Run) -> None:
    """Our kernel against what torch and transformers offer, over tree sizes and contexts."""
    for size, group in run.pick(((128, 4), (64, 3), (128, 1), (128, 8)), ((64, 2),)):
        heads = group * run.pick(8, 1)
        for nodes in run.pick((8, 16, 32, 64, 128), (5,)):
            for context in run.pick((1024, 4096, 8192, 16384, 32768), (300,)):
                attention_point(run, nodes, context, size, heads, group)


def attention_point(run: Run, nodes: int, context: int, size: int, heads: int, group: int) -> None:
    query, kv, mask = attention_inputs(run, nodes, context, size, heads, group)
    what = f"{nodes} nodes, context {context}, {heads}/{heads // group} heads of {size}"
    visible = attention.visible_slots(mask, kv.keys.shape[2])[:, None]
    scale, turned = size**-0.5, query.transpose(1, 2)
    new = [buffer[:, :, context:] for buffer in (kv.keys, kv.values)]
    old = [buffer[:, :, :context] for buffer in (kv.keys, kv.values)]
    sdpa = nn.functional.scaled_dot_product_attention

    def as_transformers() -> Tensor:
        keys, values = (torch.cat(pair, 2).repeat_interleave(group, 1) for pair in zip(old, new, strict=True))
        return sdpa(turned, keys, values, visible, scale=scale)

    methods: Timed = {
        "ours": run.graphed(lambda: attention.tree_attention(query, kv, mask, scale)),
        "transformers": as_transformers,
        "sdpa, static cache": lambda: sdpa(turned, kv.keys, kv.values, visible, scale=scale, enable_gqa=True),
        "cascade": lambda: cascade(query, kv.keys, kv.values, visible[0, 0, :, context:], context, scale),
        "flex, compiled": once(lambda: flex(run, query, kv, mask, scale)),
        "flashinfer": once(lambda: flash_infer(query, kv, mask, scale)),
    }
    for name, lacking in others_unavailable(run).items():
        methods.pop(name)
        run.add("attention", f"{what}: {name}", noted=lacking)
    read = 2 * kv.keys.numel() * kv.keys.element_size()
    work = 4 * nodes * heads * size * (context + nodes)
    us = run.time("attention", what, methods).get("ours", math.nan)
    run.add("attention", f"{what}: ours", gb_per_s=round(read / us / 1e3, 1), tflop_per_s=round(work / us / 1e6, 2))
