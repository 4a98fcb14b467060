"""A text shown while it is generated, with what was drafted in another style, and summed up in a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from specdec.stats import Stats
from specdec.text import TextStream

if TYPE_CHECKING:
    from specdec.decode import Emission
    from specdec.interfaces import Verifier

Write = Callable[[str, bool], None]  # text, and whether it was drafted


class View(Protocol):
    """Shows a text while it is generated."""

    def show(self, emission: Emission) -> None:
        """One more step."""

    def end(self) -> None:
        """That was all."""


class StreamView:
    """The text alone, what was drafted in another style."""

    def __init__(self, tokenizer: Any) -> None:
        self._write, self._pieces = _writer(), TextStream(tokenizer)

    def show(self, emission: Emission) -> None:
        for i, token in enumerate(emission.step.tokens):
            self._write(self._pieces.push(token), i < emission.step.num_accepted)

    def end(self) -> None:
        self._write(self._pieces.flush() + "\n", False)


def make_view(tokenizer: Any, *, explain: bool, live: bool) -> View:
    if not (explain or live):
        return StreamView(tokenizer)
    from specdec.cli.explain import make_tree_view

    return make_tree_view(tokenizer, is_live=live)


@dataclass(slots=True)
class Streamed:
    """What a text took; without the time for showing it."""

    stats: Stats = field(default_factory=Stats)
    seconds: float = 0.0
    first_s: float = 0.0  # until the first text
    is_interrupted: bool = False
    is_whole: bool = True  # whether it is all that was asked for

    def summary(self, verifier: Verifier, drafter: str, num_prompt: int) -> str:
        lossy = "" if verifier.lossless else " (lossy)"
        return (
            f"{self.stats.num_tokens} tokens in {self.stats.num_drafts} passes: mean acceptance length "
            f"{self.stats.mean_acceptance_length:.2f}, {self.stats.num_tokens / max(self.seconds, 1e-9):.1f} tokens/s "
            f"({num_prompt} prompt tokens, first text after {self.first_s:.2f} s; drafter {drafter}, "
            f"verifier {verifier.name}{lossy})"
        )


def stream(run: Callable[[Callable[[Emission], None]], bool], view: Callable[[], View]) -> Streamed:
    """Let ``run`` generate, and show its text as it comes.

    ``run`` reports each step to what it is given, and returns whether the text is whole.

    ``view`` is made at the first step: nothing is shown where nothing could be generated. Ctrl-C ends the text early.
    """
    streamed = Streamed()
    shown_by: View | None = None
    started, shown_s = time.perf_counter(), 0.0

    def show(emission: Emission) -> None:
        nonlocal shown_s, shown_by
        streamed.first_s = streamed.first_s or time.perf_counter() - started
        streamed.stats.add(emission.step)
        showing = time.perf_counter()
        shown_by = shown_by or view()
        shown_by.show(emission)
        shown_s += time.perf_counter() - showing

    try:
        streamed.is_whole = run(show)
    except KeyboardInterrupt:
        streamed.is_interrupted = True
    finally:
        streamed.seconds = time.perf_counter() - started - shown_s
        if shown_by is not None:
            shown_by.end()
    return streamed


def _writer() -> Write:
    """Plain text into a pipe; on a terminal, drafted text in green, or underlined where colours are off."""
    if not sys.stdout.isatty():

        def write_plain(text: str, is_drafted: bool) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        return write_plain
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    drafted = "underline" if console.no_color or console.color_system is None else "green"

    def write_styled(text: str, is_drafted: bool) -> None:
        if text:
            console.print(Text(text, style=drafted if is_drafted else ""), end="", soft_wrap=True)

    return write_styled
