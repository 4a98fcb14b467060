"""``specdec serve``: an OpenAI-compatible server in front of one model, with speculation for everybody."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.cli import options
from specdec.hub.catalog import DEFAULT_MODEL
from specdec.settings import DEFAULTS

if TYPE_CHECKING:
    from specdec.serve.service import Defaults

EXAMPLE = "Example: specdec serve --port 8000   (then open http://127.0.0.1:8000 in a browser)"


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
    verifier: options.Verifier = str(DEFAULTS.verifier),
    max_nodes: options.MaxNodes = DEFAULTS.max_nodes,
    adaptive: options.Adaptive = True,
    accelerate: options.Accelerate = True,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; loopback is for this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="The port; 0: a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="SPECDEC_API_KEY", help="What clients must send. Default: nothing."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name for clients. Default: MODEL.")
    ] = None,
    max_rows: Annotated[int, typer.Option(metavar="N", min=1, help="The most requests that run at once.")] = 16,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", min=0, help="The most requests that wait for a row; more are refused (429).")
    ] = 256,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for keys and values, such as 2GB. Default: a quarter of what is free, at most 4 GB.",
        ),
    ] = None,
    prefix_sharing: Annotated[
        bool, typer.Option("--prefix-sharing/--no-prefix-sharing", help="Process equal beginnings of prompts once.")
    ] = True,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The longest prompt. Default: the model's context.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The longest answer. Default: what the context leaves.")
    ] = None,
    max_body: Annotated[int, typer.Option(metavar="BYTES", min=1, help="The largest request.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="The longest a request may take.")] = 600.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long running answers may finish when the server is stopped.")
    ] = 30.0,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web site whose pages may ask this server (CORS); repeatable."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name of a server on loopback, behind a proxy; repeatable."),
    ] = None,
    generation_config: Annotated[
        bool,
        typer.Option(
            "--generation-config/--no-generation-config",
            help="Where a request does not say how to sample, do as the model's generation_config.json says.",
        ),
    ] = True,
) -> None:
    """Serve MODEL under /v1 as OpenAI's interface does: chat and text completions, streamed or whole.

    / is a page to try it with, /metrics is for Prometheus, /health for load balancers. There is no TLS: put a proxy in
    front before others may reach it. SIGTERM and Ctrl-C let running answers finish.
    """
    _check_installed()
    options.set_threads(threads)
    from specdec.serve.app import make_app
    from specdec.serve.gate import is_loopback
    from specdec.serve.limits import Limits
    from specdec.serve.run import bind, run, url_of
    from specdec.serve.service import Service

    if api_key == "":
        raise ValueError("api_key is empty, which every request would match; leave it out or give one")
    limits = Limits(
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_body_bytes=max_body,
        request_timeout_s=timeout,
        grace_s=grace,
    )
    _check_speculation(drafter, verifier, max_nodes, adaptive)
    asked = {
        "drafter": drafter,
        "verifier": verifier,
        "max_nodes": max_nodes,
        "adaptive": adaptive,
        "accelerate": accelerate,
        "kv_memory": int(kv_memory) if kv_memory is not None and kv_memory.isdigit() else kv_memory,
        "max_rows": max_rows,
        "max_waiting": max_waiting,
        "prefix_sharing": prefix_sharing,
    }
    with bind(host, port) as bound:  # before the model: it may take long to load
        engine, model = _load(target, drafter_model or [], dtype, device, asked)
        with engine:
            service = Service(engine, name or target, _defaults(model, is_saved=generation_config), limits)
            is_local = is_loopback(bound.getsockname()[0])
            app = make_app(
                service, api_key=api_key, origins=allowed_origin or (), is_loopback=is_local, hosts=allowed_host or ()
            )
            if not is_local and api_key is None:
                print(f"warning: everybody who can reach {host} can use this server; see --api-key", file=sys.stderr)
            run(app, service, bound, lambda: print(f"{service.name} at {url_of(bound)}", file=sys.stderr, flush=True))
            engine.close(timeout=0)


def _check_installed() -> None:
    """Raises ValueError if the extra is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ValueError(f"the server needs {', '.join(missing)}: pip install 'specdec-toolkit[serve]'")


def _check_speculation(drafter: str, verifier: str, max_nodes: int, adaptive: bool) -> None:
    """Raises ValueError for an unknown name or a value out of its range, before a model is loaded."""
    from specdec.budget.adaptive import make_budget
    from specdec.drafters import parse_drafter, tuned_file
    from specdec.verifiers import make_verifier

    make_budget(max_nodes, adaptive)
    make_verifier(verifier)
    if tuned_file(drafter) is None:
        parse_drafter(drafter)


def _load(target: str, draft_models: list[str], dtype: str, device: str, asked: dict[str, Any]) -> tuple[Any, Any]:
    """The engine, and the model it runs."""
    from specdec.cli.loading import check_tokenizers
    from specdec.cli.text import tell
    from specdec.hub.load import load_model, load_tokenizer
    from specdec.serving.engine import Engine

    model = load_model(target, dtype=dtype, device=device, progress=tell)
    tokenizer = load_tokenizer(target, progress=tell)
    for each in draft_models:
        check_tokenizers(tokenizer, each)
    drafts = [load_model(each, dtype=dtype, device=device, progress=tell) for each in draft_models]
    return Engine(model, tokenizer=tokenizer, draft_model=drafts or None, **asked), model


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
