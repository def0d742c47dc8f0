"""Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}} and a status code."""

from __future__ import annotations

import math
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
LONGEST_RETRY_S = 60.0


class APIError(Exception):
    """A request that gets no answer, and what the client is told."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
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


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error of ours."""
    assert isinstance(error, APIError)
    return error.response()


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer where a body is not of the described form."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return APIError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None).response()
