"""Every refusal in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from chatpage.errors import Busy, RequestError, Unavailable

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}
MESSAGES = {
    404: "There is nothing at {path}.",
    405: "{method} is not allowed at {path}.",
}


class Refusal(HTTPException):
    """A request that is answered with an error: a status, one sentence, and OpenAI's `param` and `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers)


def as_refusal(error: Exception) -> Refusal:
    """What a client is told about any exception. What we did not foresee is told to the log alone."""
    match error:
        case Refusal():
            return error
        case RequestError():
            return Refusal(400, str(error), param=error.param, code=error.code)
        case Busy():
            return Refusal(429, str(error), code="engine_overloaded", headers={"Retry-After": "1"})
        case Unavailable():
            return Refusal(503, str(error), code="service_unavailable", headers={"Retry-After": "2"})
        case HTTPException():
            return Refusal(error.status_code, error.detail, headers=error.headers)
    return Refusal(500, "The server failed to answer this request.", code="internal_error")


async def on_error(request: Request, error: Exception) -> JSONResponse:
    refusal = as_refusal(error)
    message = refusal.detail
    if not isinstance(error, Refusal) and refusal.status_code in MESSAGES:
        message = MESSAGES[refusal.status_code].format(path=request.url.path, method=request.method)
    headers = dict(refusal.headers or {})
    if refusal.status_code == 500:  # answered outside of our middleware
        headers["x-request-id"] = request.scope.get("request_id", "")
    return error_response(refusal.status_code, message, param=refusal.param, code=refusal.code, headers=headers)


HANDLERS: dict[Any, Any] = dict.fromkeys((HTTPException, RequestError, Busy, Unavailable, Exception), on_error)
