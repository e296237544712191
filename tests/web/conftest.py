"""Servers for the tests: one with the real engine and a tiny model, and one with a fake engine where a test asks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from chatpage.engine import Engine
from chatpage.settings import Settings
from tests.checkpoints import make
from tests.web.fake import FakeEngine
from tests.web.server import serve

SYSTEM_PROMPT = "You are a helpful assistant. You answer in short sentences."


@dataclass
class Served:
    """A running server and what is behind it."""

    url: str
    engine: Engine

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


def start(checkpoint: Path, **settings: object) -> tuple[Engine, Settings]:
    chosen = Settings(
        model=checkpoint, system_prompt=SYSTEM_PROMPT, kv_blocks=128, max_model_len=192, paranoid=True, **settings
    )
    return Engine(chosen), chosen


@pytest.fixture(scope="session")
def served(checkpoint: Path) -> Iterator[Served]:
    """The real engine, on loopback: everything is shared, and the panel sees everything."""
    engine, settings = start(checkpoint)
    with serve(engine, settings) as url:
        engine.wait_ready(60)
        yield Served(url, engine)


@pytest.fixture
def fake() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    with serve(engine, Settings()) as url:
        yield url, engine
