"""Memory of a real GPU: what is planned fits, and what does not is lived with."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from chatpage.core import NO_MEMORY
from chatpage.engine import Engine
from chatpage.errors import SettingError
from chatpage.model.kv import free_memory
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt, Request
from tests.checkpoints import make
from tests.engine.harness import paused, read, start

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="what a GPU has no memory for only a GPU can tell"
)

ON_GPU: dict[str, Any] = {
    "device": "cuda",
    "dtype": None,
    "block_size": 16,
    "kv_blocks": None,
    "max_model_len": None,
    "paranoid": False,
    "max_queue": 512,
}
LEFT = 3 * 2**30  # bytes
ALL_KINDS = [
    SamplingParams(temperature=0, max_tokens=24),
    SamplingParams(temperature=1, seed=1, top_p=0.9, max_tokens=24),
    SamplingParams(temperature=1, seed=2, top_k=40, min_p=0.1, repetition_penalty=1.2, logprobs=5, max_tokens=24),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a large vocabulary, whose keys and values soon fill some GiB."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 16_384, "vocab_size": 100_000}
    return make("llama", tmp_path_factory.mktemp("large") / "large", **sizes)


@pytest.fixture
def others() -> Iterator[list[torch.Tensor]]:
    """Memory that something else has taken, all but LEFT."""
    free = free_memory("cuda")
    taken = [torch.empty(free - LEFT, dtype=torch.uint8, device="cuda")] if free > LEFT else []
    yield taken
    taken.clear()
    torch.cuda.empty_cache()


@pytest.fixture
def run(folder: Path, others: list[torch.Tensor]) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def run(**settings: Any) -> Engine:
        engines.append(start(folder, **ON_GPU | settings))
        return engines[-1]

    yield run
    while engines:
        end(engines.pop())


def end(engine: Engine) -> None:
    """Stop, and give the memory back."""
    engine.stop(30)
    assert not engine.is_alive
    engine._core = None
    gc.collect()
    torch.cuda.empty_cache()


def refusal(run: Callable[..., Engine], **settings: Any) -> str:
    with pytest.raises(SettingError) as caught:
        run(**settings)
    said = str(caught.value)
    del caught
    gc.collect()  # the error holds on to what was loaded
    torch.cuda.empty_cache()
    return said


def ask_many(engine: Engine, count: int, length: int) -> list[str | None]:
    """How each of many answers ended, all asked at once; errors in their own words."""
    random, streams = Random(count), []
    with paused(engine):
        for number in range(count):
            tokens = tuple(random.choices(range(10, 300), k=length + number % 7))
            streams.append(engine.stream(Request(Prompt(tokens), ALL_KINDS[number % len(ALL_KINDS)])))
    ends = [read(stream) for stream in streams]
    return [answer.deltas[-1].error or answer.reason for answer in ends]


@pytest.mark.parametrize("settings", [{}, {"attention": "reference"}, {"max_sequences": 64, "max_step_tokens": 4096}])
def test_the_largest_steps_fit_beside_the_pool(run: Callable[..., Engine], settings: dict[str, Any]) -> None:
    """With a pool that takes nearly all that they leave, no allocation ever fails."""
    engine = run(kv_memory=0.95, **settings)
    assert not any("recorded" in note or "plain" in note for note in engine.notes), engine.notes
    pool_bytes = engine.num_blocks * engine.core.runner.pool.bytes_per_block
    assert pool_bytes > LEFT / 4, "the pool is what fills the memory"
    before = torch.cuda.memory_stats()["num_ooms"]
    assert set(ask_many(engine, 300, 60)) == {"length"}
    assert set(ask_many(engine, 4, 6000)) == {"length"}
    assert torch.cuda.memory_stats()["num_ooms"] == before
    print(f"{settings}: pool {pool_bytes >> 20} MiB of {LEFT >> 20}, left {torch.cuda.mem_get_info()[0] >> 20}")


def test_a_step_too_large_is_refused_with_one_that_fits(run: Callable[..., Engine], others: list[torch.Tensor]) -> None:
    others.append(torch.empty(LEFT - 2**30, dtype=torch.uint8, device="cuda"))
    said = refusal(run, max_step_tokens=2**16 - 1, max_sequences=8)
    print(said)
    advised = int(said.rstrip(".").split("use --max-step-tokens ")[1])
    engine = run(max_step_tokens=advised, max_sequences=8)
    assert set(ask_many(engine, 8, 500)) == {"length"}


def test_a_context_too_long_is_refused_with_one_that_fits(run: Callable[..., Engine]) -> None:
    for _ in range(2):  # a first start leaves behind what CUDA keeps for good
        said = refusal(run, max_model_len=16_000, kv_memory=0.05)
    print(said)
    for way in said.rstrip(".").split("--")[-2:]:
        name, value = way.split()[:2]
        better = {"max_model_len": 16_000, "kv_memory": 0.05, name.replace("-", "_"): float(value)}
        engine = run(**better | {"max_model_len": int(better["max_model_len"])})
        assert set(ask_many(engine, 4, 200)) == {"length"}
        end(engine)


def test_memory_that_something_else_takes_and_gives_back(
    run: Callable[..., Engine], others: list[torch.Tensor]
) -> None:
    engine = run(kv_memory=0.3)
    assert set(ask_many(engine, 100, 60)) == {"length"}
    torch.cuda.empty_cache()
    for size in (2**28, 2**24, 2**21):
        try:
            while True:
                others.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass
    before = torch.cuda.memory_stats()["num_ooms"]
    ends = ask_many(engine, 100, 60)
    print({end: ends.count(end) for end in set(ends)}, torch.cuda.memory_stats()["num_ooms"] - before, "failures")
    assert set(ends) <= {"length", NO_MEMORY.error}
    assert torch.cuda.memory_stats()["num_ooms"] > before
    assert engine.status == "ready"
    del others[1:]
    torch.cuda.empty_cache()
    assert set(ask_many(engine, 100, 60)) == {"length"}
