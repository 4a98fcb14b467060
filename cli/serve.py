"""``specdec serve``: an OpenAI-compatible server in front of one model, with speculation for everybody."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import options
from specdec.cli.groups import grouped
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.serve.limits import Limits
from specdec.settings import DEFAULTS

if TYPE_CHECKING:
    from socket import socket

    from specdec.serve.service import Defaults, Service
    from specdec.serving.engine import Engine

LIMITS = Limits()
EXAMPLE = "Example: specdec serve --port 8000   (then open http://127.0.0.1:8000 in a browser)"


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """How to speculate."""

    verifier: options.Verifier = str(DEFAULTS.verifier)
    max_nodes: options.MaxNodes = DEFAULTS.max_nodes
    adaptive: options.Adaptive = DEFAULTS.adaptive


@dataclass(frozen=True, kw_only=True)
class Models(options.Machine):
    """How the models run here."""

    accelerate: options.Accelerate = True


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where the server is, and who may ask."""

    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; loopback is for this machine alone.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="The port; 0: a free one.")] = 8000
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="The model's name for clients. Default: MODEL, or the name of its folder."
        ),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="KEY", envvar="SPECDEC_API_KEY", help="What clients must send. Default: nothing."
        ),
    ] = None
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origin", metavar="ORIGIN", help="A web site whose pages may ask this server (CORS); repeatable."
        ),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host", metavar="NAME", help="A further name of a server on loopback, behind a proxy; repeatable."
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise ValueError("api_key is empty, which every request would match; leave it out or give one")


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How much at a time."""

    max_rows: Annotated[
        int, typer.Option("--max-rows", metavar="N", min=1, help="The most requests that run at once.")
    ] = 16
    max_waiting: Annotated[
        int,
        typer.Option("--max-waiting", metavar="N", min=0, help="The most that wait for a row; more are refused (429)."),
    ] = 256
    kv_memory: Annotated[
        str | None,
        typer.Option(
            "--kv-memory",
            metavar="SIZE",
            help="Memory for keys and values, such as 2GB. Default: a quarter of what is free, at most 4 GB.",
        ),
    ] = None
    prefix_sharing: Annotated[
        bool, typer.Option("--prefix-sharing/--no-prefix-sharing", help="Process equal beginnings of prompts once.")
    ] = True


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What a request may ask for."""

    max_prompt_tokens: Annotated[
        int | None,
        typer.Option("--max-prompt-tokens", metavar="N", help="The longest prompt. Default: what fits."),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", help="The longest answer. Default: what fits."),
    ] = None
    max_body: Annotated[int, typer.Option("--max-body", metavar="BYTES", help="The largest request.")] = (
        LIMITS.max_body_bytes
    )
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="The longest it may take.")] = (
        LIMITS.request_timeout_s
    )
    grace: Annotated[
        float,
        typer.Option(
            "--grace", metavar="SECONDS", help="How long running answers may finish when the server is stopped."
        ),
    ] = LIMITS.grace_s
    generation_config: Annotated[
        bool,
        typer.Option(
            "--generation-config/--no-generation-config",
            help="Where a request does not say how to sample, do as the model's generation_config.json says.",
        ),
    ] = True

    @property
    def limits(self) -> Limits:
        return Limits(
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            max_body_bytes=self.max_body,
            request_timeout_s=self.timeout,
            grace_s=self.grace,
        )


@grouped
def serve(
    target: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="The model to serve: a built-in name, a folder or a Hub id.")
    ] = DEFAULT_MODEL,
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter", metavar=options.DRAFTER_FORM, help=f"The drafter; see specdec doctor. {options.QUOTING}"
        ),
    ] = str(DEFAULTS.drafter),
    drafter_model: options.DrafterModel = None,
    *,
    access: Access,
    capacity: Capacity,
    requests: Requests,
    drafting: Drafting,
    models: Models,
) -> None:
    """Serve MODEL under /v1 as OpenAI's interface does: chat and text completions, streamed or whole.

    / is a page to try it with, /metrics is for Prometheus, /health for load balancers. There is no TLS: put a proxy in
    front before others may reach it. SIGTERM and Ctrl-C let running answers finish.
    """
    _check_installed()
    options.set_threads(models.threads)
    from specdec.serve.run import bind
    from specdec.serve.service import Service

    limits = requests.limits
    _check_speculation(drafter, drafting)
    with bind(access.host, access.port) as bound:  # before the model: it may take long to load
        engine, model = _load(target, drafter, drafter_model or [], capacity, drafting, models)
        with engine:
            name = access.name or (Path(target).resolve().name if Path(target).is_dir() else target)
            service = Service(engine, name, _defaults(model, is_saved=requests.generation_config), limits)
            _run(service, access, bound)
            engine.close(timeout=0)


def _run(service: Service, access: Access, bound: socket) -> None:
    """Serve until told to stop."""
    from specdec.serve.app import make_app
    from specdec.serve.gate import is_loopback
    from specdec.serve.run import run, url_of

    is_local = is_loopback(bound.getsockname()[0])
    app = make_app(
        service,
        api_key=access.api_key,
        origins=access.allowed_origin or (),
        is_loopback=is_local,
        hosts=access.allowed_host or (),
    )
    if not is_local and access.api_key is None:
        print(f"warning: everybody who can reach {access.host} can use this server; see --api-key", file=sys.stderr)
    run(app, service, bound, lambda: print(f"{service.name} at {url_of(bound)}", file=sys.stderr, flush=True))


def _check_installed() -> None:
    """Raises ValueError if the extra is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ValueError(f"the server needs {', '.join(missing)}: pip install 'specdec-toolkit[serve]'")


def _check_speculation(drafter: str, drafting: Drafting) -> None:
    """Raises ValueError for an unknown name or a value out of its range, before a model is loaded."""
    from specdec.budget.adaptive import make_budget
    from specdec.drafters import parse_drafter, tuned_file
    from specdec.verifiers import make_verifier

    make_budget(drafting.max_nodes, drafting.adaptive)
    make_verifier(drafting.verifier)
    if tuned_file(drafter) is None:
        parse_drafter(drafter)


def _load(
    target: str, drafter: str, draft_models: list[str], capacity: Capacity, drafting: Drafting, models: Models
) -> tuple[Engine, Any]:
    """The engine, and the model it runs."""
    from specdec.cli.loading import check_tokenizers
    from specdec.cli.text import tell
    from specdec.hub.load import load_model, load_tokenizer
    from specdec.serving.engine import Engine

    def loaded(name: str) -> Any:
        return load_model(name, dtype=models.dtype, device=models.device, progress=tell)

    model, tokenizer = loaded(target), load_tokenizer(target, progress=tell)
    for name in draft_models:
        check_tokenizers(tokenizer, name)
    memory = capacity.kv_memory
    engine = Engine(
        model,
        tokenizer=tokenizer,
        drafter=drafter,
        draft_model=[loaded(name) for name in draft_models] or None,
        verifier=drafting.verifier,
        max_nodes=drafting.max_nodes,
        adaptive=drafting.adaptive,
        accelerate=models.accelerate,
        kv_memory=int(memory) if memory is not None and memory.isdigit() else memory,
        max_rows=capacity.max_rows,
        max_waiting=capacity.max_waiting,
        prefix_sharing=capacity.prefix_sharing,
    )
    return engine, model


def _defaults(model: Any, *, is_saved: bool) -> Defaults:
    """What holds where a request does not say: the ends of the model, and how its config samples."""
    from specdec.cli.saved import end_ids
    from specdec.serve.service import Defaults

    config = model.generation_config
    ends = tuple(sorted(end_ids(config)))
    if not is_saved:
        return Defaults(end_ids=ends)
    saved = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
    }
    return Defaults(end_ids=ends, **{key: value for key, value in saved.items() if value is not None})
