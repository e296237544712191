"""Checkpoints and models, made once for all tests of this folder."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from chatpage.model.load import LoadedModel, load
from chatpage.model.step import ModelRunner
from tests.checkpoints import make

BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models on one thread: several would wait for each other, and for other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's random checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda family: make(family, root / family)


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """The model as the engine loads it."""
    return cache(lambda family: load(checkpoint(family), device="cpu"))


@pytest.fixture(scope="session")
def theirs(checkpoint: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """Another instance of the same model, with transformers' own attention."""
    return cache(lambda family: AutoModelForCausalLM.from_pretrained(checkpoint(family), attn_implementation="eager"))


@pytest.fixture
def runner(loaded: Callable[[str], LoadedModel]) -> Callable[[str], ModelRunner]:
    """A runner with a fresh pool of 64 blocks, all of it NaN: what nobody wrote must never matter."""

    def make_runner(family: str) -> ModelRunner:
        runner = ModelRunner(loaded(family), num_blocks=64, block_size=BLOCK_SIZE, max_rows=64)
        for blocks in (*runner.pool.keys, *runner.pool.values):
            blocks.fill_(torch.nan)
        return runner

    return make_runner
