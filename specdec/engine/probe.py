"""Decides at load what a model can verify: trees, chains only, or nothing; and says why."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.engine.masks import MaskStyle, mask_style
from specdec.engine.wrapped import model_inside, takes
from specdec.errors import NonFiniteLogitsError, UnsupportedModelError
from specdec.interfaces import Row, Scores
from specdec.tree import TokenTree

# Cache layers whose entries can be dropped one by one: what a branching or rejected draft needs.
_PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
# A leaf reached through the tree against a plain forward of its path, relative to the spread of the logits:
# good models stay below 1e-5 in float32, wrong masks or positions give 6e-2 and more (4-layer random models).
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 0.1
_LARGEST_PASS = 2048  # columns: one chunk of a prompt and a tree


@dataclass(frozen=True, slots=True)
class Support:
    """What a model can do here; ``reason`` says why not trees."""

    can_tree: bool
    reason: str = ""
    style: MaskStyle | None = None
    max_positions: int | None = None  # positions beyond this are wrong or do not exist
    limit_reason: str = ""


class _Scorer(Protocol):
    module: Any
    vocab_size: int
    device: torch.device

    def open(self, rows: Sequence[Row]) -> None: ...
    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[Scores]: ...
    def commit(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> None: ...
    def reset(self) -> None: ...


def inspect_model(module: Any) -> Support:
    """What the config and classes of a model, or of the one inside a wrapper, say without running it.

    Raises:
        UnsupportedModelError: no causal language model, or one whose state cannot drop a rejected token.
    """
    model = model_inside(module)
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder; only decoder-only causal language models are supported"
        )
    if not callable(getattr(model, "get_output_embeddings", None)) or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM")
    config = model.config.get_text_config()
    _refuse_recurrent(model, config, name)
    limit, reason = _position_limit(model, config)
    decoder = model.get_decoder()
    code = sys.modules[type(decoder).__module__]
    by_layer_type = getattr(config, "layer_types", None) is not None and _takes_masks_by_type(decoder)
    style = mask_style(config, config._attn_implementation or "eager", model.dtype, code, by_layer_type)
    if isinstance(style, str):
        return Support(False, style, None, limit, reason)
    if not takes(module, "position_ids"):
        return Support(
            False, "its forward takes no position_ids, so siblings cannot share a position", None, limit, reason
        )
    if _has_slot_mask(model):
        return Support(
            False, "its stored mask counts cache slots, so siblings would push tokens out of it", None, limit, reason
        )
    return Support(True, "", style, limit, reason)


def _refuse_recurrent(model: Any, config: Any, name: str) -> None:
    from transformers import DynamicCache

    why = (
        f"{name} keeps a state beside plain keys and values (recurrent, convolutional or an index), which cannot drop a "
        "rejected draft token; speculative decoding needs a model whose cache is keys and values only"
    )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(why)
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # a config that the library itself cannot build a cache for
        raise UnsupportedModelError(
            f"transformers builds no key-value cache for {name}: {error}; correct its config"
        ) from error
    kinds = {type(layer).__name__ for layer in layers}
    if not kinds <= set(_PLAIN_LAYERS):
        raise UnsupportedModelError(f"{why} (cache layers: {', '.join(sorted(kinds - set(_PLAIN_LAYERS)))})")


def _takes_masks_by_type(decoder: nn.Module) -> bool:
    """Whether the code below takes a dict of masks by type of layer; a config may name types that its model ignores."""
    forwards = (inspect.unwrap(type(module).forward) for module in decoder.modules())
    return any("dict" in forward.__code__.co_names for forward in forwards if hasattr(forward, "__code__"))


def _has_slot_mask(model: Any) -> bool:
    """Whether there is a stored causal mask over cache slots (GPT-Neo's).

    Siblings would count as distance in one that forgets old slots, and as length in any: it ends at the last position, which
    a tree's slots reach long before its tokens do.
    """
    masks = (b for b in model.buffers() if b.dtype in (torch.bool, torch.uint8) and b.dim() >= 2 and b.shape[-1] > 1)
    return any(b.shape[-2] == b.shape[-1] for b in masks)


def _has_growing_table(model: Any) -> bool:
    """Whether positions are looked up in a computed table that its module makes longer when needed (XGLM's sinusoids)."""
    return any(callable(getattr(module, "make_weights", None)) for module in model.modules())


def _position_limit(model: Any, config: Any) -> tuple[int | None, str]:
    """The number of positions beyond which the model has no table entry or changes its rotary frequencies."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    ropes = _ropes(config)
    kinds = {rope.get("rope_type") for rope in ropes}
    if "longrope" in kinds:
        key = "original_max_position_embeddings"
        originals = [value for value in (getattr(config, key, None), *(rope.get(key) for rope in ropes)) if value]
        limit = min(originals, default=limit)
        return limit, "its long-context rotary embedding changes all frequencies beyond position"
    if "dynamic" in kinds:
        return limit, "its dynamic rotary embedding changes all frequencies beyond position"
    if getattr(config, "attn_temperature_tuning", False):
        # Llama 4 reads the temperature's step off cache slots, which run ahead of positions by a pass at most.
        limit = max(config.floor_scale - _LARGEST_PASS, 0)
        return limit, "its attention temperature counts cache slots beyond position"
    if not ropes and not _has_growing_table(model):
        return limit, "its table of positions has"
    return None, ""


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The rotary settings, one for each type of layer; none if positions are learned or a bias."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return []
    return [p for p in parameters.values() if isinstance(p, dict)] or [parameters]


def probe(target: _Scorer, branching: bool) -> str:
    """Try small trees (or chains) and compare leaves with plain forwards; says what is wrong, or nothing."""
    shape = "tree" if branching else "chain"
    order = torch.randperm(min(target.vocab_size, 30000), generator=torch.Generator().manual_seed(0))
    ids = (order.tolist() * 11)[:11]  # a vocabulary may be smaller than 11
    try:
        leaves = _score_trees(target, ids) if branching else _score_chains(target, ids)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        return f"its own code fails on a small {shape}: {type(error).__name__}: {error}"
    finally:
        target.reset()
    if all(_agree(target, tokens, logits) for tokens, logits in leaves):
        return ""
    return f"a small {shape} gave other logits than plain forwards of its paths"


def _score_trees(target: _Scorer, ids: list[int]) -> list[tuple[list[int], Tensor]]:
    """The last leaf of each of two trees behind prompts of different lengths: tokens up to it, and logits."""
    rows = [Row(0, ids[:6], 10), Row(1, ids[:3], 10)]
    # Two branches of two: the last leaf must see neither node of the first branch.
    trees = [TokenTree(tuple(ids[5:10]), (-1, 0, 0, 1, 2)), TokenTree(tuple(ids[2:5]), (-1, 0, 0))]
    target.open(rows)
    scores = target.score(rows, trees)
    return [
        (row.tokens + tree.path_tokens(len(tree) - 1), score.logits[-1])
        for row, tree, score in zip(rows, trees, scores, strict=True)
    ]


def _score_chains(target: _Scorer, ids: list[int]) -> list[tuple[list[int], Tensor]]:
    """The ends of a chain, and of another that follows after a part of the first was dropped."""
    row = Row(0, ids[:6], 10)
    target.open([row])
    before = target.score([row], [TokenTree.chain(ids[5], ids[6:8])])[0].logits[-1]
    target.commit([row], [(0, 1)])
    row.tokens += [ids[6], ids[8]]
    after = target.score([row], [TokenTree.chain(ids[8], ids[9:11])])[0].logits[-1]
    return [(ids[:8], before), (ids[:7] + ids[8:11], after)]


@torch.no_grad()
def _agree(target: _Scorer, tokens: list[int], logits: Tensor) -> bool:
    model, device = model_inside(target.module), target.device
    plain = target.module(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0, -1].double()
    if not bool(plain.isfinite().all()):
        name = type(model).__name__
        raise NonFiniteLogitsError(
            f"{name} gives NaN or infinite logits for a short prompt; check its weights, or try float32"
        )
    return agree(logits, plain, _lowest_dtype(model, device))


def _lowest_dtype(model: Any, device: torch.device) -> torch.dtype:
    """What a pass rounds to: its weights' dtype, or that of an autocast around it."""
    found: torch.dtype = model.dtype
    if torch.is_autocast_enabled(device.type) and found not in (torch.float16, torch.bfloat16):
        found = torch.get_autocast_dtype(device.type)
    return found


def agree(logits: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether ``logits`` are those ``expected`` up to rounding in ``dtype`` (None: their own), judged by their spread."""
    wanted = expected.double()
    allowed = _TOLERANCE.get(dtype or logits.dtype, _TOLERANCE_16_BIT) * (wanted - wanted.mean()).norm()
    return bool((logits.double() - wanted).norm() <= allowed)
