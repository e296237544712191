"""What a stranger may do: hosts, origins, sizes, patience, paths."""

import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from chatpage.settings import Settings
from chatpage.web import limits
from chatpage.web.app import create_app
from tests.web.fake import FakeEngine
from tests.web.server import serve

CHAT = "/v1/chat/completions"
TRAVERSALS = [
    "/panel/../pyproject.toml",
    "/panel/%2e%2e/pyproject.toml",
    "/panel/..%2fpyproject.toml",
    "/panel/%2e%2e%2f%2e%2e%2fetc/passwd",
    "/panel/..%5cpyproject.toml",
    "/panel//etc/passwd",
    "/panel/%00",
    "/panel/....//pyproject.toml",
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(FakeEngine(), Settings()) as url:
        yield url


def status_of(url: str, host: str) -> int:
    return httpx.get(f"{url}/healthz", headers={"Host": host}).status_code


@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "127.0.0.1:80", "[::1]:7860", "LOCALHOST"])
def test_own_names(url: str, host: str):
    assert status_of(url, host) == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:7860", "[", ""])
def test_names_of_others(url: str, host: str):
    assert status_of(url, host) in (400, 421)


def test_a_space_answers_to_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPACE_ID", "me/chat")
    monkeypatch.setenv("SPACE_HOST", "me-chat.hf.space")
    with serve(FakeEngine(), Settings()) as url:
        assert [status_of(url, host) for host in ("me-chat.hf.space", "10.0.0.7:7860", "evil.example")] == [
            200,
            200,
            421,
        ]
        policy = httpx.get(f"{url}/readyz").headers["content-security-policy"]
        assert policy.endswith("frame-ancestors 'self' https://huggingface.co https://*.hf.space")


def test_a_server_on_all_addresses_answers_to_any_name():
    with serve(FakeEngine(), Settings(host="0.0.0.0")) as url:
        assert status_of(url, "chat.lan:7860") == 200
        assert httpx.get(f"{url}/metrics").status_code == 403


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Origin": "{url}"}, True),
        ({"Origin": "{url}", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "http://localhost:1"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://["}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
    ],
)
def test_other_origins(url: str, headers: dict[str, str], allowed: bool):
    headers = {name: value.replace("{url}", url) for name, value in headers.items()}
    answer = httpx.post(url + CHAT, json={}, headers=headers)
    assert answer.status_code == (400 if allowed else 403)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_no_preflight_succeeds(url: str):
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(url + CHAT, headers=headers)
    assert answer.status_code >= 400
    assert "access-control-allow-origin" not in answer.headers


def test_large_bodies(url: str):
    announced = httpx.post(url + CHAT, content=b"x" * (limits.MAX_BODY + 1))
    in_pieces = httpx.post(
        url + CHAT, content=(b" " * 65_536 for _ in range(20)), headers={"Content-Type": "application/json"}
    )
    fits = httpx.post(url + CHAT, content=b" " * limits.MAX_BODY, headers={"Content-Type": "application/json"})
    assert [answer.status_code for answer in (announced, in_pieces, fits)] == [413, 413, 400]
    assert announced.json()["error"]["code"] == in_pieces.json()["error"]["code"] == "request_too_large"


def test_slow_bodies(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode())
        started = time.monotonic()
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 3


def test_long_addresses(url: str):
    assert httpx.get(f"{url}/healthz?{'x' * 9000}").status_code == 414


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_file_outside_the_panel(url: str, path: str):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while piece := connection.recv(65_536):
            answer += piece
    assert answer.split()[1] in (b"404", b"400")
    assert b"root:" not in answer
    assert b"[project]" not in answer


def test_the_panel(url: str):
    page = httpx.get(f"{url}/panel", follow_redirects=True)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    script = httpx.get(f"{url}/panel/panel.js")
    assert "javascript" in script.headers["content-type"]
    policy = script.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'self'" in policy
    assert script.headers["x-content-type-options"] == "nosniff"


def test_the_routes_are_these():
    app = create_app(FakeEngine(), Settings(), page=False)  # type: ignore[arg-type]
    paths = [getattr(route, "path", "") for route in app.routes]
    assert sorted(set(paths)) == ["/healthz", "/kv", "/metrics", "/panel", "/readyz", "/v1"]
