"""What of ``generate()``'s options the loop takes over, and what it refuses by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.distributions import LogitsTransform, WarperTransform
from specdec.errors import UnsupportedOptionError
from specdec.generation.arguments import DEFAULT_CACHES, check_cache, check_input_ids, check_mask, unsupported
from specdec.grammar.masks import GrammarProcessor, GrammarTransform
from specdec.sampling import GREEDY, SamplingParams

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # in generate()'s order
_SMALLEST = 2.0**-60  # 1 minus this is 1


def check_generation_config(config: Any) -> None:
    """Refuse what another decoding method or another cache would be needed for.

    Raises:
        UnsupportedOptionError: names the option and its value.
    """
    refused = {
        "num_beams": (config.num_beams or 1) > 1,
        "num_beam_groups": (getattr(config, "num_beam_groups", None) or 1) > 1,
        "penalty_alpha": bool(getattr(config, "penalty_alpha", None)),
        "dola_layers": getattr(config, "dola_layers", None) is not None,
        "constraints": getattr(config, "constraints", None) is not None,
        "force_words_ids": getattr(config, "force_words_ids", None) is not None,
        "prompt_lookup_num_tokens": getattr(config, "prompt_lookup_num_tokens", None) is not None,
        "assistant_early_exit": getattr(config, "assistant_early_exit", None) is not None,
        "use_mtp": bool(getattr(config, "use_mtp", None)),
        "cache_implementation": config.cache_implementation not in DEFAULT_CACHES,
        "use_cache": config.use_cache is False,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise unsupported(name, getattr(config, name))


def check_inputs(input_ids: Tensor, kwargs: dict[str, Any]) -> list[int]:
    """Refuse inputs that the loop would not pass on; (B,) the masked tokens on the left of each row.

    Raises:
        UnsupportedOptionError: names the input.
        ValueError: an empty prompt, a mask of another shape, or masked tokens elsewhere.
    """
    known = ("attention_mask", "past_key_values", "position_ids", "use_cache", "logits_to_keep", "cache_position")
    unknown = [name for name, value in kwargs.items() if name not in known and value is not None]
    if unknown:
        raise UnsupportedOptionError(
            f"inputs that the model would need at every pass are not supported: {', '.join(unknown)}; pass token ids "
            "and their attention_mask, or call model.generate"
        )
    check_input_ids("input_ids", input_ids)
    past = kwargs.get("past_key_values")
    if getattr(past, "_is_user_defined", False):  # generate() makes one where the caller has none
        check_cache(past)
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is not None:
        check_mask(mask, input_ids)
    _check_positions(kwargs.get("position_ids"), mask, input_ids)
    return [0] * len(input_ids) if mask is None else _num_padding(mask)


def _check_positions(positions: Tensor | None, mask: Tensor | None, input_ids: Tensor) -> None:
    if positions is None:
        return
    counted = torch.ones_like(input_ids) if mask is None else mask.long()
    expected = (counted.cumsum(-1) - 1).to(positions.device)
    if positions.shape[-1] != input_ids.shape[1] or bool(((positions != expected) & (counted == 1)).any()):
        raise UnsupportedOptionError(
            "position_ids are counted from the attention mask, which must be as wide as the token ids; others are not "
            f"supported: got shape {tuple(positions.shape)} for token ids {tuple(input_ids.shape)}"
        )


def _num_padding(mask: Tensor) -> list[int]:
    kept = mask.bool()
    padding = (~kept).sum(1)
    left = torch.arange(kept.shape[1], device=kept.device)[None] >= padding[:, None]
    if not bool((kept == left).all()):
        raise ValueError("attention_mask may mask tokens on the left only; set the tokenizer's padding_side to 'left'")
    if bool((padding == kept.shape[1]).any()):
        raise ValueError("attention_mask masks every token of a row: each prompt needs at least one token")
    return padding.tolist()


def fast_policy(processors: Sequence[Any], config: Any) -> LogitsTransform | None:
    """The fused path if ``processors`` are the usual warpers, behind a grammar or not, and nothing else."""
    has_grammar = bool(processors) and isinstance(processors[0], GrammarProcessor)
    warpers = processors[has_grammar:]
    # Only the general path keeps the processed scores that output_scores asks for.
    if not _are_plain_warpers(warpers) or config.output_scores:
        return None
    params = _read_warpers(warpers) if config.do_sample else GREEDY
    return GrammarTransform(params) if has_grammar else WarperTransform(params)


def _are_plain_warpers(processors: Sequence[Any]) -> bool:
    kinds = [type(p) for p in processors]
    in_order = [kind for kind in _WARPERS if kind in kinds]
    return kinds == in_order and all(
        getattr(p, "min_tokens_to_keep", 1) == 1 and getattr(p, "filter_value", -float("inf")) == -float("inf")
        for p in processors
    )


def _read_warpers(processors: Sequence[Any]) -> SamplingParams:
    found = {type(p): p for p in processors}
    return SamplingParams(
        temperature=found[TemperatureLogitsWarper].temperature if TemperatureLogitsWarper in found else 1.0,
        top_k=found[TopKLogitsWarper].top_k if TopKLogitsWarper in found else 0,
        top_p=_nucleus(found[TopPLogitsWarper].top_p) if TopPLogitsWarper in found else 1.0,
        min_p=found[MinPLogitsWarper].min_p if MinPLogitsWarper in found else 0.0,
    )


def sampling_params(config: Any) -> SamplingParams:
    """What a drafter should imitate when the processors are more than these."""
    if not config.do_sample:
        return GREEDY
    top_p = 1.0 if config.top_p is None else _nucleus(config.top_p)
    return SamplingParams(config.temperature or 1.0, config.top_k or 0, top_p, config.min_p or 0.0)


def _nucleus(top_p: float) -> float:
    """``top_p`` as generate() reads it: from 1 on it is off; 0 keeps the best token alone, as the smallest number does."""
    return min(max(top_p, _SMALLEST), 1.0)
