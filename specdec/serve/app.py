"""The application: OpenAI's paths, /metrics, /health and a page to try it with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from specdec.serve.bodies import ChatBody, FieldError, TextBody
from specdec.serve.errors import ApiError, ErrorAnswer
from specdec.serve.gate import Gate
from specdec.serve.monitor import CONTENT_TYPE, Monitor
from specdec.serve.page import page_headers, page_html
from specdec.serve.replies import Reply
from specdec.serve.service import Service

# For /openapi.json.
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    is_loopback: bool = True,
    hosts: Sequence[str] = (),
) -> ASGIApp:
    """The server's application.

    Args:
        service: the model and the engine that runs it.
        api_key: what clients must send; None lets everybody in.
        origins: web pages that may ask from a browser; none by default.
        is_loopback: whether only this machine can reach the server.
        hosts: names of the server besides loopback ones, where it is on loopback.
    """
    app = FastAPI(title="specdec", docs_url=None, redoc_url=None)
    monitor = Monitor(service.backend.metrics, service.name)
    _add_completions(app, service, monitor)
    _add_models(app, service)
    _add_rest(app, service, monitor)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_bad_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    gate: ASGIApp = Gate(app, service.limits, api_key, is_loopback=is_loopback, hosts=hosts)
    if origins:
        gate = CORSMiddleware(gate, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"])
    return gate


def _add_completions(app: FastAPI, service: Service, monitor: Monitor) -> None:
    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(body: ChatBody) -> Response:
        return Reply(service, monitor, body, await service.start_chat(body)).response()

    @app.post("/v1/completions", responses=_ERRORS)
    async def completions(body: TextBody) -> Response:
        return Reply(service, monitor, body, await service.start_text(body)).response()


def _add_models(app: FastAPI, service: Service) -> None:
    model = {
        "id": service.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "specdec",
        "max_model_len": service.backend.max_length,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model)


def _add_rest(app: FastAPI, service: Service, monitor: Monitor) -> None:
    html, headers = page_html(), page_headers()

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse(
            {"status": "stopping" if service.is_stopping else "ok"}, 503 if service.is_stopping else 200
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(monitor.exposition(), headers={"Content-Type": CONTENT_TYPE})

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_bad_body(_: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, with the place where it is."""
    assert isinstance(error, RequestValidationError)
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][1]}"
        return ApiError(400, f"the body is not valid JSON: {reason}").response()
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return ApiError(400, str(cause), param=cause.field).response()
    # Of what was tried for a field that may have several types, what came furthest was probably meant.
    tried = [first, *(each for each in others if _place(each).startswith(_place(first)))]
    found = max(tried, key=lambda each: len(each["loc"]))
    field, message = _place(found), found["msg"][:1].lower() + found["msg"][1:]
    return ApiError(400, f"{field or 'the body'}: {message}", param=field or None).response()


def _place(found: dict[str, Any]) -> str:
    """The field that a validation error is about, as one would write it in Python."""
    steps = [step for step in found["loc"][1:] if not _is_branch(step)]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _is_branch(step: str | int) -> bool:
    """Whether a step names the type that was tried rather than a field."""
    return isinstance(step, str) and (step in ("str", "int", "float", "bool") or "[" in step)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail) or HTTPStatus(error.status_code).phrase
    if error.status_code in (404, 405):
        message = f"there is no {request.method} {request.url.path}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_fault(_: Request, __: Exception) -> Response:
    """A fault of ours: the traceback is in the server's log, not in the answer."""
    return ApiError(500, "the server failed; its log says why").response()
