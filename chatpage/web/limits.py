"""What a stranger may do to the server: which hosts, which origins, how large a body, how many viewers.

Plain ASGI middleware: Starlette's BaseHTTPMiddleware would stand between a stream and its client's disconnect.
"""

import asyncio
import ipaddress
import os
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatpage.settings import Settings
from chatpage.web.errors import Refusal, error_response

MAX_BODY = 2**20  # bytes
MAX_TARGET = 8192  # bytes of path and query
BODY_SECONDS = 10.0  # to send a whole body
MAX_VIEWERS = 1000  # of the panel, at once

OUR_PATHS = ("/v1", "/kv", "/panel", "/healthz", "/readyz", "/metrics")
OUR_POLICY = "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'"
SPACES = "https://huggingface.co https://*.hf.space"


class Guard:
    """Refuses a request before anything reads it, and adds our headers to every response.

    Hosts: a server on loopback, or in a Space, answers to its own names alone, so that no web page can reach it by
    pointing a name of its own at it (DNS rebinding). An address is never such a name. A server that listens on other
    addresses is reachable under names that only its operator knows, and answers to any.

    Origins: on our own routes, what a page of another site sends is refused. Gradio's routes have their own rules.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.hosts = _allowed_hosts(settings)
        self.ancestors = f"frame-ancestors 'self' {SPACES}" if _in_space() else "frame-ancestors 'self'"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        request_id = scope["request_id"] = secrets.token_hex(8)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message), scope["path"], request_id)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send_with_headers)
        else:
            response = error_response(refusal.status_code, refusal.detail, code=refusal.code)
            await response(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET:
            return Refusal(414, f"The address is longer than {MAX_TARGET} bytes.", code="uri_too_long")
        if self.hosts is not None and not _is_allowed(headers.get("host", ""), self.hosts):
            return Refusal(421, "This server does not answer to that Host name.", code="unknown_host")
        if _is_ours(scope["path"]) and scope["method"] not in ("GET", "HEAD") and _is_foreign(headers):
            return Refusal(403, "Requests from pages of another site are refused.", code="foreign_origin")
        return None

    def _add_headers(self, headers: MutableHeaders, path: str, request_id: str) -> None:
        headers["x-request-id"] = request_id
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "same-origin"
        policy = f"{OUR_POLICY}; {self.ancestors}" if _is_ours(path) else self.ancestors
        headers.append("content-security-policy", policy)  # beside the page's own: a browser obeys both


class BodyLimit:
    """Counts a body while it is read: too large is 413, too slow is 408. Nothing is read ahead or kept."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY:
            refusal = _too_large()
            response = error_response(413, refusal.detail, headers={"Connection": "close"})
            await response(scope, receive, send)
            return
        await self.app(scope, _Counted(receive), send)


class _Counted:
    """`receive` of one request, until its body has been read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._size = 0
        self._deadline: float | None = None
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to leave
        self._deadline = self._deadline or time.monotonic() + BODY_SECONDS
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(
                408, f"The body did not arrive within {BODY_SECONDS:g} seconds.", headers={"Connection": "close"}
            ) from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > MAX_BODY:
            raise _too_large()
        return message


def _too_large() -> Refusal:
    return Refusal(413, f"The body is larger than {MAX_BODY} bytes.", headers={"Connection": "close"})


def _in_space(environ: Mapping[str, str] = os.environ) -> bool:
    return bool(environ.get("SPACE_ID"))


def _allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """Names that the server answers to, in lower case and without a port; None for any."""
    names = {"localhost", settings.host.lower()}
    if _in_space() and os.environ.get("SPACE_HOST"):
        return frozenset(names | {os.environ["SPACE_HOST"].lower()})
    return frozenset(names) if settings.on_loopback else None


def _is_allowed(host: str, names: frozenset[str]) -> bool:
    name = _host_name(host)
    if name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    """The name in a Host header: without port and brackets, in lower case."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _authority(origin: str) -> str:
    """Host and port of an Origin header; nothing for `null` and for nonsense."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_ours(path: str) -> bool:
    return any(path == ours or path.startswith(ours + "/") for ours in OUR_PATHS)


def _is_foreign(headers: Headers) -> bool:
    """Whether a browser says that a page of another origin sends this."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and _authority(origin) != headers.get("host", "").lower()
