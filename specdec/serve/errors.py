"""What the server says when it cannot answer: OpenAI's error object, with the field that is to blame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200: ``param`` is the field to blame, ``code`` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = _writable(message), None if param is None else _writable(param)
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The JSON object that clients of OpenAI's interface read."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400: ``param`` has a value that cannot be used."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def queue_full(reason: str) -> ApiError:
    return ApiError(429, f"too many requests: {reason}", code="queue_full", headers={"Retry-After": "1"})


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the request took longer than the server's limit of {seconds:g} s", code="timeout")


def blame(error: Exception, fields: Iterable[str]) -> ApiError:
    """400 for what the library refused; its messages begin with the name of the option."""
    message = str(error)
    first = message.split(maxsplit=1)[0].strip("'`:,") if message else ""
    return bad(first if first in set(fields) else None, message)


def _writable(text: str) -> str:
    """``text`` without the halves of characters that JSON can spell and no answer can repeat."""
    return text.encode(errors="replace").decode()
