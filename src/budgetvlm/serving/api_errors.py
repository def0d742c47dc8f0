"""Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}} and a status code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

CODES = {
    400: "invalid_request", 401: "invalid_api_key", 403: "not_allowed", 404: "not_found", 405: "method_not_allowed",
    408: "too_slow", 413: "too_large", 415: "unsupported_media_type", 429: "queue_full", 500: "internal_error",
    503: "not_ready",
}  # fmt: skip
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
LONGEST_RETRY_S = 60.0


class APIError(Exception):
    """A request that gets no answer, and what the client is told."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param = status, _writable(message), param and _writable(param)
        self.code = code or CODES.get(status, "invalid_request")
        self.retry_after_s = retry_after_s

    @property
    def document(self) -> dict[str, Any]:
        """The body of the response."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        after = {} if self.retry_after_s is None else {"Retry-After": str(_whole_seconds(self.retry_after_s))}
        return JSONResponse(self.document, self.status, headers=after)


def _whole_seconds(seconds: float) -> int:
    """Seconds as the header has them: whole ones, at least one, and no longer than a client should wait."""
    return max(1, math.ceil(min(seconds, LONGEST_RETRY_S)))


def _writable(text: str) -> str:
    """A text that can be sent: JSON may bring half characters, which UTF-8 has no bytes for."""
    return text.encode("utf-8", "replace").decode("utf-8")


async def respond(request: Request, error: Exception) -> JSONResponse:
    """Answer with what an error tells the client; how it came about is in the log alone."""
    told = _told(error)
    request.scope["visit"].error = told.code
    response = told.response()
    response.headers.update(getattr(error, "headers", None) or {})  # such as which methods are allowed
    return response


def _told_of_field(errors: Sequence[Any]) -> APIError:
    """What is said of a body: where a field may have one of several types, of the type that it nearly had."""
    nearest = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    # the names that pydantic gives to such types hold brackets, and no field of ours does
    where = ".".join(str(part) for part in nearest["loc"] if part != "body" and "[" not in str(part))
    return APIError(400, f"{where}: {nearest['msg']}" if where else nearest["msg"], param=where or None)


def _told(error: Exception) -> APIError:
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestValidationError):
        return _told_of_field(error.errors())
    if isinstance(error, HTTPException):
        return APIError(error.status_code, str(error.detail))
    return APIError(500, "the server failed on this request")
