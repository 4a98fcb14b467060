"""``specdec generate``: one prompt, streamed, with what was drafted shown in colour."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import options
from specdec.cli.groups import grouped
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.settings import DEFAULTS

if TYPE_CHECKING:
    from specdec.cli.loading import Loaded
    from specdec.decode import Emission
    from specdec.grammar.inputs import Grammar

EXAMPLE = 'Example: specdec generate "Write a haiku about trees." --temperature 0.7 --seed 1'


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample."""

    temperature: options.OwnTemperature = None
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sample from the N most probable tokens; 0: all. Default: as saved, or 50."),
    ] = None
    top_p: Annotated[
        float | None, typer.Option(metavar="X", help="Sample from the most probable mass X. Default: as saved, or all.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Drop tokens less probable than X times the most probable. Default: as saved, or 0."
        ),
    ] = None
    generation_config: Annotated[
        bool,
        typer.Option(
            "--generation-config/--no-generation-config",
            help="Decode as the model's saved generation_config.json says; or from its own distribution, but for the ends.",
        ),
    ] = True

    def __post_init__(self) -> None:
        from specdec.sampling import SamplingParams

        top_p = 1.0 if self.top_p is None else self.top_p
        SamplingParams(self.temperature or 0.0, self.top_k or 0, top_p, self.min_p or 0.0)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt and how it is shown."""

    max_new_tokens: options.MaxNewTokens = options.DEFAULT_MAX_NEW_TOKENS
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before the prompt.")] = None
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template if it has one.")] = True
    explain: Annotated[bool, typer.Option("--explain", help="Print each step's tree with its accepted path.")] = False
    live: Annotated[bool, typer.Option("--live", help="Show the tree of each step in place, as the text grows.")] = (
        False
    )

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.system is not None and not self.chat:
            raise ValueError("a system message needs the chat template: leave out --no-chat or --system")
        if self.explain and self.live:
            raise ValueError("--explain prints every step and --live redraws one: choose one of them")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the answer must match."""

    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE.json", help="Write JSON that this schema allows.")
    ] = None
    regex: Annotated[
        str | None,
        typer.Option("--regex", metavar="PATTERN", help="Write text that this regular expression matches whole."),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option("--grammar", metavar="FILE.lark", help="Write text that this Lark grammar derives."),
    ] = None
    choices: Annotated[str | None, typer.Option("--choices", metavar="A,B,...", help="Write one of these.")] = None

    def read(self) -> Grammar | None:
        """The one that was given.

        Raises:
            ValueError: more than one, or one that cannot be read.
        """
        from specdec.grammar.inputs import Grammar

        names = [f"--{name.replace('_', '-')}" for name, value in asdict(self).items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} cannot both hold: choose one of them")
        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema)
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.grammar is not None:
            return Grammar.lark(self.grammar)
        return None if self.choices is None else Grammar.choices(self.choices.split(","))


@grouped
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
    config: options.Config = None,
    *,
    speculation: options.Speculation,
    sampling: Sampling,
    shown: Prompt,
    form: Form,
    engine: options.Engine,
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
    grammar = form.read()
    options.set_threads(engine.threads)
    from specdec.cli.loading import check_prompt, load
    from specdec.cli.saved import sampling_options
    from specdec.cli.stream import make_view, stream
    from specdec.verifiers import make_verifier

    tuned = options.read_config(config)
    if tuned is not None:
        entry = tuned.nearest(1)
        drafter = entry.drafter
        speculation = replace(speculation, max_nodes=entry.max_nodes, adaptive=entry.adaptive)
    verifier = make_verifier(speculation.verifier)
    _check(drafter, speculation)
    loaded = load(target, drafter_model or (), engine)
    options.warn_config(tuned, loaded.model)
    ids = _render(loaded.tokenizer, text, shown.system, shown.chat)
    check_prompt(loaded.target, ids, shown.max_new_tokens, "the prompt")
    # A tuned file also says what passes cost here.
    is_file = config is not None and config.suffix == ".json"
    arguments: dict[str, Any] = {
        **asdict(speculation),
        "drafter": str(config) if is_file else drafter,
        "verifier": verifier,
        "draft_model": loaded.runtime.draft_models or None,
        "cuda_graphs": engine.cuda_graphs,
        "tokenizer": loaded.tokenizer,
        "max_new_tokens": shown.max_new_tokens,
        **sampling_options(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, is_saved=sampling.generation_config
        ),
    }
    if grammar is not None:
        arguments |= {"grammar": grammar, "return_dict_in_generate": True}
    reasons: list[str] = []
    streamed = stream(
        partial(_generate, loaded, ids, arguments, reasons, is_saved=sampling.generation_config),
        partial(make_view, loaded.tokenizer, explain=shown.explain, live=shown.live),
    )
    drafter_name = _drafter_name(drafter, bool(drafter_model))
    print(streamed.summary(verifier, drafter_name, len(ids)), file=sys.stderr)
    if streamed.is_interrupted:
        raise typer.Exit(130)
    if grammar is not None and reasons != ["stop"]:
        print("the text ended before it was complete: allow more with --max-new-tokens", file=sys.stderr)
        raise typer.Exit(1)


def _check(drafter: str, speculation: options.Speculation) -> None:
    """Bad values are found before a model is loaded.

    Raises:
        ValueError: an unknown name, or a value out of its range.
    """
    from specdec.budget.adaptive import make_budget
    from specdec.drafters import parse_drafter
    from specdec.rng import PhiloxRng

    make_budget(speculation.max_nodes, speculation.adaptive)
    PhiloxRng(speculation.seed)
    parse_drafter(drafter)


def _drafter_name(drafter: str, has_draft_model: bool) -> str:
    """The drafter's name without its options; of ``auto``, what it stands for."""
    from specdec.drafters import parse_drafter, resolved_drafter

    name, _ = parse_drafter(drafter)
    resolved = resolved_drafter(name, has_draft_model)
    return resolved if resolved == name else f"{resolved} ({name})"


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


def _generate(
    loaded: Loaded,
    ids: list[int],
    arguments: dict[str, Any],
    reasons: list[str],
    show: Callable[[Emission], None],
    *,
    is_saved: bool,
) -> None:
    """The library's own generate(), on the model as it was loaded; adds to ``reasons`` why a text with a grammar ended.

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
            output = specdec.generate(model, input_ids, attention_mask=mask, on_emission=show, **arguments)
            if "grammar" in arguments:
                reasons += output.finish_reasons
        except UnsupportedOptionError as error:
            raise UnsupportedOptionError(
                f"the model's saved generation config cannot be followed: {error}; or add --no-generation-config"
            ) from None
