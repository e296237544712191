"""The whole program as a process: starting, refusing to start, and ending in time with streams open."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from chatpage.errors import SettingError
from chatpage.launch import bind, url_of
from tests.checkpoints import make

ROOT = Path(__file__).parents[1]
ASK = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "app.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, once it is ready, and its address."""
    process = start("--port", 0, *arguments)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("ChatPage is on ").strip()
        deadline = time.monotonic() + 120
        while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield process, url
    finally:
        process.kill()
        process.wait()


def test_a_port_is_taken_at_once():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(SettingError, match=f"--port is {port}; another program listens on 127.0.0.1:{port}"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host.invalid"])
def test_an_address_of_another_machine(host: str):
    with pytest.raises(SettingError, match="--host is"):
        bind(host, 0)


def test_addresses():
    assert url_of("127.0.0.1", 7860) == "http://127.0.0.1:7860"
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url_of("::", 80) == url_of("::1", 80) == "http://[::1]:80"


def test_a_busy_port_ends_the_program_before_the_model_is_loaded(checkpoint: Path):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        process = start("--port", port, "--model", checkpoint)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"chatpage: --port is {port}; another program listens on 127.0.0.1:{port} already")
    assert err.count("\n") == 1


def test_a_model_that_is_not_there_ends_the_program_before_the_port_is_taken():
    process = start("--port", 0, "--model", "/no/such/folder")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == "chatpage: --model is '/no/such/folder'; it must be a folder that exists, or an id of the Hub.\n"


def test_a_model_that_cannot_be_loaded_ends_the_program(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    process = start("--port", 0, "--model", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out.startswith("ChatPage is on http://127.0.0.1:")
    assert err.startswith("chatpage: ")
    assert str(tmp_path) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_time_with_streams_open(checkpoint: Path, sig: signal.Signals):
    with running("--model", checkpoint) as (process, url), ExitStack() as stack:
        page = httpx.get(f"{url}/")
        assert page.status_code == 200
        client = stack.enter_context(httpx.Client(timeout=30))
        heartbeat = stack.enter_context(client.stream("GET", f"{url}/gradio_api/heartbeat/of-a-tab"))
        panel = stack.enter_context(client.stream("GET", f"{url}/kv/events"))
        answer = stack.enter_context(client.stream("POST", f"{url}/v1/chat/completions", json=ASK))
        lines = answer.iter_lines()
        next(lines)
        assert heartbeat.status_code == panel.status_code == 200
        asked = time.monotonic()
        process.send_signal(sig)
        assert list(lines)[-2] == "data: [DONE]"
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - asked < 5
        assert process.returncode == 0
        assert "Traceback" not in err
        assert "leaked" not in err
        assert "is ready on cpu in float32" in out


def test_asked_twice_it_ends_at_once(checkpoint: Path):
    with (
        running("--model", checkpoint) as (process, url),
        httpx.Client(timeout=30) as client,
        client.stream("GET", f"{url}/gradio_api/heartbeat/of-a-tab"),
    ):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(10)
        assert time.monotonic() - asked < 1


def test_the_page_is_up_while_the_model_loads(checkpoint: Path):
    process = start("--port", 0, "--model", checkpoint)
    assert process.stdout is not None
    url = process.stdout.readline().removeprefix("ChatPage is on ").strip()
    try:
        ready = httpx.get(f"{url}/readyz", timeout=60)
        assert ready.status_code == 503
        assert ready.json()["status"] == "starting"
        assert httpx.get(f"{url}/", timeout=60).status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
