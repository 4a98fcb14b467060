"""What ``specdec generate`` shows besides plain text: every step's tree with its accepted path, as a list or live."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from rich.tree import Tree

from specdec.cli.details import Details, details, token_texts
from specdec.decode import Emission
from specdec.text import TextStream

PIPE_WIDTH = 160
ACCEPTED, REJECTED, OWN = "green", "red", "cyan"  # told by signs too, where there is no colour


@dataclass(slots=True)
class Texts:
    """The texts of tokens, each asked for once."""

    tokenizer: Any
    _known: dict[int, str] = field(default_factory=dict)

    def quoted(self, token: int) -> str:
        if token not in self._known:
            self._known |= token_texts(self.tokenizer, [token])
        return repr(self._known[token])


def step_tree(emission: Emission, seen: Details, texts: Texts) -> Tree:
    """One step: what was drafted below the newest token, with the target's probabilities and what was kept."""
    step, kept = emission.step, set(emission.step.nodes)
    seconds = (step.draft_s + step.score_s + step.verify_s) * step.num_rows
    head = (
        f"step {step.index + 1}, {1000 * seconds:.0f} ms: {step.num_drafted} drafted, {step.num_accepted} accepted, "
        f"{len(step.tokens)} emitted"
    )
    tree = Tree(Text(head, style="bold"))
    branches = {0: tree.add(Text(f"after {texts.quoted(step.tree_tokens[0])}"))}
    children = emission.tree.children()
    for node, parent in enumerate(step.tree_parents):
        if parent >= 0:
            branches[node] = branches[parent].add(_node(emission, seen, node, node in kept, texts))
    last = step.nodes[-1]
    said = "the target's own" if children[last] or last == 0 else "the target's own, behind the whole draft"
    own = f"+ {texts.quoted(step.tokens[-1])}  p = {seen.token_probs[-1]:.2g}  {said}"
    branches[last].add(Text(own, style=OWN))
    return tree


def _node(emission: Emission, seen: Details, node: int, is_kept: bool, texts: Texts) -> Text:
    facts = [f"p = {seen.node_probs[node]:.2g}"]
    drawn = seen.draft_probs[node]
    if drawn is not None:
        facts.append(f"drafted with {drawn:.2g}")
    elif seen.estimates:
        facts.append(f"estimate {seen.estimates[node]:.2g}")
    line = f"{'✓' if is_kept else '✗'} {texts.quoted(emission.step.tree_tokens[node])}  {'  '.join(facts)}"
    return Text(line, style=ACCEPTED if is_kept else REJECTED)


class ExplainView:
    """Prints each step's tree, and the whole text at the end."""

    def __init__(self, tokenizer: Any) -> None:
        # A pipe has no width; trees would be cut at 80 columns.
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
        self._texts, self._stream, self._parts = Texts(tokenizer), TextStream(tokenizer), list[str]()

    def show(self, emission: Emission) -> None:
        self.console.print(step_tree(emission, details(emission), self._texts))
        self._parts += [self._stream.push(token) for token in emission.step.tokens]

    def end(self) -> None:
        self.console.print(Text(f"\n{''.join(self._parts)}{self._stream.flush()}"))


class LiveView:
    """The text as it grows above the tree of the newest step, redrawn in place. Made for a terminal."""

    def __init__(self, tokenizer: Any, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._texts, self._stream = Texts(tokenizer), TextStream(tokenizer)
        self._answer = Text()
        self._num_passes = self._num_tokens = 0
        self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def show(self, emission: Emission) -> None:
        step = emission.step
        for i, token in enumerate(step.tokens):
            self._answer.append(self._stream.push(token), ACCEPTED if i < step.num_accepted else OWN)
        self._num_passes += 1
        self._num_tokens += len(step.tokens)
        title = (
            f"{self._num_tokens} tokens in {self._num_passes} passes: {self._num_tokens / self._num_passes:.2f} a pass"
        )
        panel = Panel(step_tree(emission, details(emission), self._texts), title=title, title_align="left")
        # The end of the text stays in sight: what does not fit is left out at the top.
        width, height = self.console.size
        lines = self._answer.wrap(self.console, width)[-max(height // 2, 1) :]
        self._live.update(Group(Text("\n").join(lines), panel), refresh=True)

    def end(self) -> None:
        self._answer.append(self._stream.flush(), OWN)
        self._live.update(self._answer, refresh=True)
        self._live.stop()


def make_tree_view(tokenizer: Any, *, is_live: bool) -> ExplainView | LiveView:
    """The view that was asked for.

    Raises:
        ValueError: the live one without a terminal.
    """
    if is_live and not sys.stdout.isatty():
        raise ValueError("--live needs a terminal; into a pipe or file, use --explain")
    return LiveView(tokenizer) if is_live else ExplainView(tokenizer)
