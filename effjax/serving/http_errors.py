"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` and a status."""

import logging
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from effjax.serving.engine import Overloaded

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An error with its status and what a client may look at.

    Attributes:
      status: of HTTP.
      kind: OpenAI's `type`.
      param: field of the request that it is about.
      code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        fields = {"type": self.kind, "param": self.param, "code": self.code}
        return {"error": {"message": str(self), **fields}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


def as_error(error: Exception) -> ApiError:
    """What a client is told of an exception. Of one that is ours, and not the client's, it hears no details."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            return ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded")
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case ValueError():
            return ApiError(400, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", kind="server_error")


def add_error_handlers(app: fastapi.FastAPI) -> None:
    """Lets every error of an application be answered in that form."""

    async def answer(_: fastapi.Request, error: Exception) -> JSONResponse:
        return as_error(error).response()

    for kind in (
        ApiError,
        Overloaded,
        RequestValidationError,
        HTTPException,
        ValueError,
        Exception,
    ):
        app.add_exception_handler(kind, answer)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by the name of its field."""
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']}")
    names = [str(part) for part in found["loc"][1:]]
    field = names[0] if names else "body"
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(names)} is not a field that is honoured here", param=field)
    given = "" if found["type"] == "missing" else f", not {str(found['input'])[:80]!r}"
    return ApiError(400, f"{field}: {found['msg']}{given}", param=field)
