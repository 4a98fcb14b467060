"""What a command takes over from a model's saved generation_config.json, and what options on the command line replace.

The rule is generate()'s: penalties, bans, sampling, minimum lengths and ends hold as saved, and what an option says
replaces it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# How a text is made and what is returned with it, which the command decides: the text does not depend on them.
_MEANS = (
    "use_cache", "cache_implementation", "cache_config", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
)  # fmt: skip


def sampling_options(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, *, is_saved: bool
) -> dict[str, Any]:
    """What generate() is told: the options that were given; without the saved config (not ``is_saved``) all of them."""
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if not is_saved:
        neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        values = {name: neutral[name] if value is None else value for name, value in values.items()}
    options = {name: value for name, value in values.items() if value is not None}
    if "temperature" in options:
        options["do_sample"] = options["temperature"] > 0
    return options if options.get("do_sample", True) else {"do_sample": False}


@contextmanager
def generation_config(model: Any, *, is_saved: bool) -> Iterator[None]:
    """Let ``model`` decode as its saved config says, or from its own distribution; the config is put back after."""
    own = model.generation_config
    model.generation_config = _text_config(own) if is_saved else neutral_config(own)
    try:
        yield
    finally:
        model.generation_config = own


def neutral_config(own: Any, eos_ids: frozenset[int] | None = None) -> Any:
    """A config that asks for nothing but the ends of a text, those of ``own`` or ``eos_ids``.

    A checkpoint's config may ask for penalties, top-k and more, which generate() adds to whatever is passed to it.
    """
    from transformers import GenerationConfig

    ends = end_ids(own) if eos_ids is None else eos_ids
    padding = own.pad_token_id if isinstance(own.pad_token_id, int) else min(ends, default=0)
    return GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=sorted(ends) or None, pad_token_id=padding)


def end_ids(config: Any) -> frozenset[int]:
    """The token ids that end a text."""
    ids = config.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No reminders of transformers' about options: what a reader of a command can mend the command says itself."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _text_config(own: Any) -> Any:
    """``own`` with transformers' defaults for what does not change the text, and a token for padding."""
    from transformers import GenerationConfig

    default, config = GenerationConfig(), copy.deepcopy(own)
    for name in _MEANS:
        if hasattr(config, name):
            setattr(config, name, getattr(default, name, None))
    if config.pad_token_id is None:  # one row is never padded; generate() would remind of it
        config.pad_token_id = min(end_ids(config), default=0)
    return config
