"""Silences transformers and the Hub's client for a while."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(hide_bars: bool = True) -> Iterator[None]:
    """No warnings and, if ``hide_bars``, no progress bars from transformers and the Hub's client; restored after."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as hf_logging

    levels = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    hf_bars, hub_bars = hf_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    hf_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    if hide_bars:
        hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if hide_bars and hf_bars:
            hf_logging.enable_progress_bar()
        if hide_bars and hub_bars:
            enable_progress_bars()
        elif hide_bars:
            disable_progress_bars()
