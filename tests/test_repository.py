"""What the repository promises as a whole: what it needs, what its wheel carries, and what importing it loads."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "node_modules", "tests")


def front_matter() -> dict[str, str]:
    """The head of the README, from which a Space is configured."""
    found = re.match(r"---\n(.*?)\n---\n", README, re.DOTALL)
    assert found, "README.md must begin with a Space's front matter"
    return {key: value.strip(" \"'") for key, value in (line.split(":", 1) for line in found[1].splitlines())}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; built from a copy, so that nothing is left behind in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "unpacked")
    return folder / "unpacked"


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_space_installs_what_the_package_needs():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == PROJECT["project"]["dependencies"]


def test_a_space_finds_its_settings_in_the_readme():
    head = front_matter()
    assert head["sdk"] == "gradio"
    assert head["python_version"] == "3.12"
    assert (ROOT / head["app_file"]).is_file()
    assert re.fullmatch(r"6\.31\.\d+", head["sdk_version"])
    assert 0 < len(head["short_description"]) < 60
    assert {"title", "emoji", "colorFrom", "colorTo", "license"} <= head.keys()


def test_every_package_is_in_the_wheel(wheel):
    """The list in pyproject.toml is written by hand, since the panel's folder is not one that is found."""
    assert {f"chatpage/{name}" for name in files(ROOT / "chatpage")} <= files(wheel)
    assert {f"chatpage/static/{name}" for name in files(ROOT / "static")} <= files(wheel)
    assert {"chatpage/web/page.css", "chatpage/static/panel.js"} <= files(wheel)
    assert any(name.startswith("chatpage/tutor/weights/") and name.endswith(".safetensors") for name in files(wheel))
    assert not any(name.startswith(("tests", "static", "benchmarks", "kernels")) for name in files(wheel))


def test_an_installed_wheel_serves_page_and_panel_from_an_empty_folder(wheel, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    serve = [sys.executable, "-c", "import sys; from chatpage.cli import main; sys.exit(main())", "serve"]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    with subprocess.Popen([*serve, "--port", str(port)], cwd=tmp_path, env=environment) as server:
        try:
            wait_until_ready(server, f"{url}/readyz")
            assert get(f"{url}/panel/panel.js") == (wheel / "chatpage/static/panel.js").read_bytes()
            assert b"<gradio-app" in get(f"{url}/") or b"window.gradio_config" in get(f"{url}/")
        finally:
            server.terminate()
        assert server.wait(timeout=10) == 0
    assert not list(tmp_path.iterdir())


def wait_until_ready(server: subprocess.Popen, url: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):  # not listening yet, or 503
            get(url)
            return
        time.sleep(0.2)
    pytest.fail(f"the server did not become ready (exit status {server.poll()})")


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


def test_the_lower_layers_load_neither_torch_nor_gradio():
    low = ["chatpage", "chatpage.errors", "chatpage.events"]
    low += [
        f"chatpage.{part}.{path.stem}".removesuffix(".__init__")
        for part in ("cache", "schedule")
        for path in (ROOT / "chatpage" / part).glob("*.py")
    ]
    code = f"import sys, {', '.join(low)}; sys.exit(bool({{'torch', 'transformers', 'gradio'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_tracked_file_names_a_machine():
    """Nobody else has the folders of whoever wrote a file."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    personal = re.compile(rb"(?<![\w.])/(home|Users|root|work)/\w")
    for name in filter(None, tracked.stdout.split("\0")):
        found = personal.search((ROOT / name).read_bytes())
        assert not found, f"{name} names {found and found.group()!r}"
