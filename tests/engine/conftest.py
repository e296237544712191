"""A checkpoint of each family, made once, and engines that must be clean when their test is over."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chatpage.engine import Engine
from chatpage.model.step import ModelRunner
from tests.checkpoints import make
from tests.engine.harness import assert_clean, start


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["step by step", "overlapped"])
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a step stays in flight while the next one is scheduled, as on a GPU. It must make no difference."""
    start = ModelRunner.__init__

    def start_so(self: ModelRunner, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.overlaps = request.param

    monkeypatch.setattr(ModelRunner, "__init__", start_so)
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda family: make(family, folder / family)


@pytest.fixture
def launch(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """Starts engines: `launch(family, **settings)`. Those that still run at the end must hold nothing then."""
    engines: list[Engine] = []

    def launch(family: str = "llama", **settings: Any) -> Engine:
        engines.append(start(checkpoint(family), **settings))
        return engines[-1]

    yield launch
    try:
        for engine in engines:
            if engine.status == "ready":
                assert_clean(engine)
    finally:
        for engine in engines:
            engine.stop()
            assert not engine.is_alive


@pytest.fixture
def engine(launch: Callable[..., Engine]) -> Engine:
    return launch()
