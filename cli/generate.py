"""``specdec generate``: one prompt, streamed, with what was drafted shown in colour."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from specdec.cli import options
from specdec.defaults import DEFAULT_DRAFTER, DEFAULT_MAX_NEW_TOKENS, DEFAULT_MAX_NODES, DEFAULT_VERIFIER
from specdec.hub.catalog import DEFAULT_MODEL

if TYPE_CHECKING:
    from specdec.cli.loading import Loaded
    from specdec.decode import Decoder, Emission
    from specdec.interfaces import Row
    from specdec.stats import Stats

EXAMPLE = 'Example: specdec generate "Write a haiku about trees." --temperature 0.7 --seed 1'

Write = Callable[[str, bool], None]  # text, and whether it was drafted


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; - reads standard input.")],
    target: options.Target = DEFAULT_MODEL,
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter", metavar=options.DRAFTER_FORM, help=f"The drafter; see specdec doctor. {options.QUOTING}"
        ),
    ] = DEFAULT_DRAFTER,
    drafter_model: options.DrafterModel = None,
    verifier: options.Verifier = DEFAULT_VERIFIER,
    max_new_tokens: options.MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    temperature: options.Temperature = 0.0,
    top_k: Annotated[int, typer.Option(metavar="N", help="Sample from the N most probable tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(metavar="X", help="Sample from the most probable mass X.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="X", help="Drop tokens less probable than X times the most probable.")
    ] = 0.0,
    seed: options.Seed = 0,
    max_nodes: options.MaxNodes = DEFAULT_MAX_NODES,
    adaptive: options.Adaptive = True,
    config: options.Config = None,
    accelerate: options.Accelerate = True,
    cuda_graphs: options.CudaGraphs = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before the prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template if it has one.")] = True,
    explain: Annotated[bool, typer.Option("--explain", help="Print each step's tree with its accepted path.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show the tree of each step in place, as the text grows.")
    ] = False,
) -> None:
    """Answer PROMPT, streaming the text as it is generated.

    On a terminal, tokens that were drafted and accepted are green (underlined where there is no colour) and the
    target's own are plain. A line on standard error sums up at the end. --explain and --live show how it came about.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty; write some text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if system is not None and not chat:
        raise ValueError("a system message needs the chat template: leave out --no-chat or --system")
    if explain and live:
        raise ValueError("--explain prints every step and --live redraws one: choose one of them")
    options.set_threads(threads)
    from specdec.budget import make_budget
    from specdec.cli.loading import check_prompt, load
    from specdec.drafters import parse_drafter
    from specdec.interfaces import Row
    from specdec.rng import PhiloxRng
    from specdec.sampling import SamplingParams
    from specdec.verifiers import make_verifier

    tuned = options.read_config(config)
    if tuned is not None:
        entry = tuned.nearest(1)
        drafter, max_nodes, adaptive = entry.drafter, entry.max_nodes, entry.adaptive
    budget = make_budget(max_nodes, adaptive, tuned.costs() if tuned else None)
    params, rng = SamplingParams(temperature, top_k, top_p, min_p), PhiloxRng(seed)
    parse_drafter(drafter)
    rule = make_verifier(verifier)
    loaded = load(target, drafter_model or (), dtype, device, accelerate=accelerate, cuda_graphs=cuda_graphs)
    options.warn_config(tuned, loaded.model)
    ids = _render(loaded.tokenizer, text, system, chat)
    check_prompt(loaded.engine, ids, max_new_tokens, "the prompt")
    decoder = _decoder(loaded, drafter, rule, params, rng, budget)
    view = _view(loaded.tokenizer, explain=explain, live=live)
    _stream(decoder, Row(0, ids, len(ids) + max_new_tokens), view)


def _render(tokenizer: Any, text: str, system: str | None, chat: bool) -> list[int]:
    """The prompt's token ids."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if system is not None and not has_template:
        raise ValueError("a system message needs a chat template, and this model has none: leave out --system")
    if not (chat and has_template):
        return list(tokenizer(text)["input_ids"])
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def _decoder(loaded: Loaded, drafter: str, rule: Any, params: Any, rng: Any, budget: Any) -> Decoder:
    from specdec.cli.loading import eos_ids
    from specdec.decode import Decoder
    from specdec.distributions import WarperTransform
    from specdec.drafters import make_drafter
    from specdec.interfaces import DraftContext

    ends = eos_ids(loaded.model)
    proposer = make_drafter(drafter, DraftContext(loaded.engine, rule, loaded.own_draft_models))
    logits_transform = WarperTransform(params)
    return Decoder(loaded.engine, proposer, rule, logits_transform, rng, lambda row: row.tokens[-1] in ends, budget)


class View(Protocol):
    """Shows a text while it is generated."""

    def show(self, emission: Emission) -> None:
        """One more step."""

    def end(self) -> None:
        """That was all."""


class StreamView:
    """The text alone, what was drafted in another style."""

    def __init__(self, tokenizer: Any) -> None:
        from specdec.cli.text import TextStream

        self._write, self._pieces = _writer(), TextStream(tokenizer)

    def show(self, emission: Emission) -> None:
        for i, token in enumerate(emission.step.tokens):
            self._write(self._pieces.push(token), i < emission.step.num_accepted)

    def end(self) -> None:
        self._write(self._pieces.flush() + "\n", False)


def _view(tokenizer: Any, *, explain: bool, live: bool) -> View:
    if not (explain or live):
        return StreamView(tokenizer)
    from specdec.cli.explain import make_view

    return make_view(tokenizer, is_live=live)


def _stream(decoder: Decoder, row: Row, view: View) -> None:
    """Generate ``row``, showing its text as it comes, and sum up; Ctrl-C ends it early with status 130."""
    from specdec.stats import Stats

    stats = Stats()
    is_interrupted = False
    started = time.perf_counter()
    first_s = shown_s = 0.0
    try:
        for emission in decoder.run([row]):
            first_s = first_s or time.perf_counter() - started
            stats.add(emission.step)
            showing = time.perf_counter()
            view.show(emission)
            shown_s += time.perf_counter() - showing
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        seconds = time.perf_counter() - started - shown_s
        view.end()
    print(_summary(decoder, row, stats, seconds, first_s), file=sys.stderr)
    if is_interrupted:
        raise typer.Exit(130)


def _summary(decoder: Decoder, row: Row, stats: Stats, seconds: float, first_s: float) -> str:
    lossy = "" if decoder.verifier.lossless else " (lossy)"
    return (
        f"{stats.num_tokens} tokens in {stats.num_drafts} passes: mean acceptance length "
        f"{stats.mean_acceptance_length:.2f}, {stats.num_tokens / max(seconds, 1e-9):.1f} tokens/s "
        f"({row.num_prompt} prompt tokens, first text after {first_s:.2f} s; drafter {decoder.drafter.name}, "
        f"verifier {decoder.verifier.name}{lossy})"
    )


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
