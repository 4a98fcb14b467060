"""``specdec generate``: one prompt, streamed, with what was drafted shown in colour."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from specdec.cli import options
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.settings import DEFAULTS

if TYPE_CHECKING:
    from specdec.cli.loading import Loaded
    from specdec.decode import Emission
    from specdec.interfaces import Verifier
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
    ] = str(DEFAULTS.drafter),
    drafter_model: options.DrafterModel = None,
    verifier: options.Verifier = str(DEFAULTS.verifier),
    max_new_tokens: options.MaxNewTokens = options.DEFAULT_MAX_NEW_TOKENS,
    temperature: options.OwnTemperature = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sample from the N most probable tokens; 0: all. Default: as saved, or 50."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="X", help="Sample from the most probable mass X. Default: as saved, or all.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Drop tokens less probable than X times the most probable. Default: as saved, or 0."
        ),
    ] = None,
    seed: options.Seed = 0,
    max_nodes: options.MaxNodes = DEFAULTS.max_nodes,
    adaptive: options.Adaptive = True,
    config: options.Config = None,
    accelerate: options.Accelerate = True,
    cuda_graphs: options.CudaGraphs = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    generation_config: Annotated[
        bool,
        typer.Option(
            "--generation-config/--no-generation-config",
            help="Decode as the model's saved generation_config.json says; or from its own distribution, but for the ends.",
        ),
    ] = True,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before the prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template if it has one.")] = True,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.GrammarFile = None,
    choices: options.Choices = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print each step's tree with its accepted path.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show the tree of each step in place, as the text grows.")
    ] = False,
) -> None:
    """Answer PROMPT, streaming the text as it is generated.

    The text is that of transformers' generate(): what the model's saved generation_config.json asks for holds (penalties,
    bans, sampling, ends), and the options given here replace its values.

    On a terminal, tokens that were drafted and accepted are green (underlined where there is no colour) and the
    target's own are plain. A line on standard error sums up at the end. --explain and --live show how it came about.

    --json-schema, --regex, --grammar and --choices let the model write nothing else. Status 1 if the text ended before
    it was complete.
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
    form = options.read_grammar(json_schema, regex, grammar, choices)
    options.set_threads(threads)
    from specdec.cli.loading import check_prompt, load
    from specdec.cli.saved import sampling_options

    tuned = options.read_config(config)
    if tuned is not None:
        entry = tuned.nearest(1)
        drafter, max_nodes, adaptive = entry.drafter, entry.max_nodes, entry.adaptive
    sampling = sampling_options(temperature, top_k, top_p, min_p, is_saved=generation_config)
    rule = _check(drafter, verifier, max_nodes, adaptive, seed, (temperature, top_k, top_p, min_p))
    loaded = load(target, drafter_model or (), dtype, device, accelerate=accelerate, cuda_graphs=cuda_graphs)
    options.warn_config(tuned, loaded.model)
    ids = _render(loaded.tokenizer, text, system, chat)
    check_prompt(loaded.target, ids, max_new_tokens, "the prompt")
    # A tuned file also says what passes cost here.
    is_file = config is not None and config.suffix == ".json"
    asked: dict[str, Any] = {
        "drafter": str(config) if is_file else drafter,
        "verifier": rule,
        "draft_model": loaded.runtime.draft_models or None,
        "max_nodes": max_nodes,
        "adaptive": adaptive,
        "cuda_graphs": cuda_graphs,
        "seed": seed,
        "tokenizer": loaded.tokenizer,
        "max_new_tokens": max_new_tokens,
        **sampling,
    }
    if form is not None:
        asked |= {"grammar": form, "return_dict_in_generate": True}
    view = partial(_view, loaded.tokenizer, explain=explain, live=live)
    _stream(loaded, ids, asked, view, drafter, is_saved=generation_config)


def _check(
    drafter: str, verifier: str, max_nodes: int, adaptive: bool, seed: int, sampling: tuple[float | None, ...]
) -> Verifier:
    """The rule called ``verifier``; bad values are found before a model is loaded.

    Raises:
        ValueError: an unknown name, or a value out of its range.
    """
    from specdec.budget.adaptive import make_budget
    from specdec.drafters import parse_drafter
    from specdec.rng import PhiloxRng
    from specdec.sampling import SamplingParams
    from specdec.verifiers import make_verifier

    make_budget(max_nodes, adaptive)
    temperature, top_k, top_p, min_p = sampling
    SamplingParams(temperature or 0.0, int(top_k or 0), 1.0 if top_p is None else top_p, min_p or 0.0)
    PhiloxRng(seed)
    parse_drafter(drafter)
    return make_verifier(verifier)


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


def _stream(
    loaded: Loaded,
    ids: list[int],
    asked: dict[str, Any],
    make_view: Callable[[], View],
    drafter: str,
    *,
    is_saved: bool,
) -> None:
    """Generate what is ``asked``, showing its text as it comes, and sum up; Ctrl-C ends it early with status 130."""
    from specdec.stats import Stats

    stats = Stats()
    is_interrupted = False
    is_whole = True
    view: View | None = None  # nothing is shown where nothing could be generated
    started = time.perf_counter()
    first_s = shown_s = 0.0

    def show(emission: Emission) -> None:
        nonlocal first_s, shown_s, view
        first_s = first_s or time.perf_counter() - started
        stats.add(emission.step)
        showing = time.perf_counter()
        view = view or make_view()
        view.show(emission)
        shown_s += time.perf_counter() - showing

    try:
        is_whole = _generate(loaded, ids, asked, show, is_saved=is_saved)
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        seconds = time.perf_counter() - started - shown_s
        if view is not None:
            view.end()
    print(_summary(asked["verifier"], drafter, len(ids), stats, seconds, first_s), file=sys.stderr)
    if is_interrupted:
        raise typer.Exit(130)
    if not is_whole:
        print("the text ended before it was complete: allow more with --max-new-tokens", file=sys.stderr)
        raise typer.Exit(1)


def _generate(
    loaded: Loaded, ids: list[int], asked: dict[str, Any], show: Callable[[Emission], None], *, is_saved: bool
) -> bool:
    """The library's own generate(), on the model as it was loaded; whether the text is all that its grammar asks for.

    Raises:
        UnsupportedOptionError: the saved generation config asks for another way of decoding.
    """
    import torch

    import specdec
    from specdec.cli.saved import generation_config, silent_transformers
    from specdec.errors import UnsupportedOptionError

    model = loaded.target.model
    input_ids = torch.tensor([ids], device=loaded.target.device)
    with generation_config(model, is_saved=is_saved), silent_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* was tuned for ")  # told already
        try:
            mask = torch.ones_like(input_ids)
            output = specdec.generate(model, input_ids, attention_mask=mask, on_emission=show, **asked)
            return "grammar" not in asked or output.finish_reasons == ("stop",)
        except UnsupportedOptionError as error:
            raise UnsupportedOptionError(
                f"the model's saved generation config cannot be followed: {error}; or add --no-generation-config"
            ) from None


def _summary(rule: Verifier, drafter: str, num_prompt: int, stats: Stats, seconds: float, first_s: float) -> str:
    lossy = "" if rule.lossless else " (lossy)"
    return (
        f"{stats.num_tokens} tokens in {stats.num_drafts} passes: mean acceptance length "
        f"{stats.mean_acceptance_length:.2f}, {stats.num_tokens / max(seconds, 1e-9):.1f} tokens/s "
        f"({num_prompt} prompt tokens, first text after {first_s:.2f} s; drafter {drafter.partition(':')[0]}, "
        f"verifier {rule.name}{lossy})"
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
