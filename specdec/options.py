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

from specdec.errors import UnsupportedOptionError
from specdec.policy import ParamsPolicy, Policy
from specdec.sampling import GREEDY, SamplingParams

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # in generate()'s order


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
        "cache_implementation": config.cache_implementation is not None,
        "use_cache": config.use_cache is False,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise UnsupportedOptionError(
                f"{name}={getattr(config, name)!r} is not supported by speculative generation; leave it out, or call model.generate"
            )


def check_model_kwargs(kwargs: dict[str, Any], input_ids: Tensor) -> Tensor | None:
    """Refuse inputs that the loop would not pass on; the attention mask (B, L), if there is one.

    Raises:
        UnsupportedOptionError: names the input.
    """
    mask: Tensor | None = kwargs.get("attention_mask")
    past = kwargs.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        raise UnsupportedOptionError(
            "past_key_values is not supported: the loop keeps its own cache; pass the whole prompt"
        )
    positions = kwargs.get("position_ids")
    if positions is not None:
        counted = torch.ones_like(input_ids) if mask is None else mask.long()
        expected = counted.cumsum(-1) - 1
        if bool(((positions != expected) & (counted == 1)).any()):
            raise UnsupportedOptionError("position_ids are counted from the attention mask; others are not supported")
    known = ("attention_mask", "past_key_values", "position_ids", "use_cache", "logits_to_keep", "cache_position")
    unknown = [name for name, value in kwargs.items() if name not in known and value is not None]
    if unknown:
        raise UnsupportedOptionError(
            f"inputs that the model would need at every pass are not supported: {', '.join(unknown)}"
        )
    return mask


def num_padding(input_ids: Tensor, mask: Tensor | None) -> list[int]:
    """(B,) masked tokens on the left of each row.

    Raises:
        ValueError: an empty prompt, or masked tokens elsewhere.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be (batch, length) with at least one token, got shape {tuple(input_ids.shape)}"
        )
    if mask is None:
        return [0] * input_ids.shape[0]
    kept = mask.bool()
    padding = (~kept).sum(1)
    left = torch.arange(kept.shape[1], device=kept.device)[None] >= padding[:, None]
    if not bool((kept == left).all()):
        raise ValueError("attention_mask may mask tokens on the left only; set the tokenizer's padding_side to 'left'")
    if bool((padding == kept.shape[1]).any()):
        raise ValueError("attention_mask masks every token of a row: each prompt needs at least one token")
    return padding.tolist()


def fast_policy(processors: Sequence[Any], config: Any) -> Policy | None:
    """The fused path if ``processors`` are the usual warpers and nothing else."""
    # Only the general path keeps the processed scores that output_scores asks for.
    if not _are_plain_warpers(processors) or config.output_scores:
        return None
    return ParamsPolicy(_read_warpers(processors) if config.do_sample else GREEDY)


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
        top_p=found[TopPLogitsWarper].top_p if TopPLogitsWarper in found else 1.0,
        min_p=found[MinPLogitsWarper].min_p if MinPLogitsWarper in found else 0.0,
    )


def sampling_params(config: Any) -> SamplingParams:
    """What a drafter should imitate when the processors are more than these."""
    if not config.do_sample:
        return GREEDY
    return SamplingParams(config.temperature or 1.0, config.top_k or 0, config.top_p or 1.0, config.min_p or 0.0)
