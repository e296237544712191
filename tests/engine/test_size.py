"""How long a context and how large a pool an engine gives itself."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from chatpage import startup
from chatpage.engine import Engine
from chatpage.errors import ChatPageError, SettingError
from chatpage.startup import ALLOCATION
from tests.engine.gpu import FakeGPU


def test_a_context_that_the_memory_does_not_hold_is_shortened_with_a_note(
    launch: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = launch(max_model_len=None)
    block_bytes = whole.core.runner.pool.bytes_per_block
    monkeypatch.setattr(startup, "free_memory", lambda device: 11 * block_bytes)
    small = launch(kv_memory=1.0, kv_blocks=None, max_model_len=None, system_prompt=["Be brief."])
    assert (small.num_blocks, small.max_model_len) == (10, 10 * small.block_size)
    assert small.max_model_len < whole.max_model_len
    assert any(str(small.max_model_len) in note for note in small.notes)


def test_a_context_that_was_asked_for_is_never_shortened(
    launch: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "free_memory", lambda device: 2**20)
    with pytest.raises(SettingError, match="--max-model-len"):
        launch(max_model_len=512, kv_blocks=None, kv_memory=0.1)


def test_more_blocks_than_memory_is_one_sentence(launch: Callable[..., Engine]) -> None:
    with pytest.raises(SettingError, match=r"--kv-blocks is 9000000000000, .* do not fit"):
        launch(kv_blocks=9 * 10**12)


# -- on a GPU ----------------------------------------------------------------------------------------------------------

SIZES = {"kv_blocks": None, "max_model_len": None, "max_step_tokens": 64, "sharing": "off"}  # prompts take no blocks


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    gpu = FakeGPU()
    gpu.install(monkeypatch)
    return gpu


@pytest.fixture
def block_bytes(launch: Callable[..., Engine]) -> int:
    return launch().core.runner.pool.bytes_per_block


def rounding(engine: Engine) -> int:
    return len(engine.core.runner.pool.tensors) * ALLOCATION


def refusal(launch: Callable[..., Engine], **settings: Any) -> str:
    with pytest.raises(ChatPageError) as caught:
        launch(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def advice(said: str) -> list[dict[str, Any]]:
    """The settings that a message says to use; those joined by `with` go together."""
    ways = re.split(r", | or ", said[said.index("use ") :])
    return [
        {name[2:].replace("-", "_"): float(value) for name, value in re.findall(r"(--[a-z-]+) ([\d.]+\d|\d)", way)}
        for way in ways
    ]


def test_the_largest_step_is_left_out_of_what_is_shared(
    launch: Callable[..., Engine], gpu: FakeGPU, block_bytes: int
) -> None:
    gpu.memory = 10**8
    engine = launch(**SIZES | {"kv_memory": 0.5, "max_sequences": 4096, "max_model_len": 512, "max_step_tokens": 10**4})
    assert engine.num_blocks == (10**8 - 10**4 * gpu.step - rounding(engine)) // 2 // block_bytes - 1
    assert gpu.log[-4:] == ["kernels", "try 10000 recorded", "pool", "record"]


def test_a_step_that_does_not_fit_is_refused_with_one_that_does(launch: Callable[..., Engine], gpu: FakeGPU) -> None:
    gpu.memory = 14 * 10**6
    gpu.step = 10**5
    said = refusal(launch, **SIZES | {"max_step_tokens": 200})
    assert said == (
        "--max-step-tokens is 200, but a step of so many tokens does not fit into the free 13 MiB: "
        "use --max-step-tokens 12."
    )
    assert launch(**SIZES | {"max_step_tokens": 12}).status == "ready"


def test_no_memory_for_any_step(launch: Callable[..., Engine], gpu: FakeGPU) -> None:
    gpu.memory = gpu.step - 1
    assert refusal(launch, **SIZES) == (
        "the model leaves 0 MiB of memory, which is too little for a step: use a smaller model."
    )


def test_recording_that_runs_out_of_memory_is_no_reason_not_to_record(
    launch: Callable[..., Engine], gpu: FakeGPU
) -> None:
    """The step is too large, and that is what is said."""
    error = RuntimeError("the capture was broken off")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    gpu.recording = error
    assert "too little for a step" in refusal(launch, **SIZES)


def test_what_is_gone_when_the_pool_is_made(launch: Callable[..., Engine], gpu: FakeGPU) -> None:
    gpu.memory, gpu.taken = 10**8, 3 * 10**7
    said = refusal(launch, **SIZES)
    assert re.fullmatch(
        r"--kv-blocks is \d+, but so many blocks of \d+ bytes could not be allocated: use --kv-blocks \d+\.", said
    )
    [way] = advice(said)
    gpu.taken = 0
    assert launch(**SIZES | {"max_model_len": 100} | {name: int(value) for name, value in way.items()})


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_blocks": 10**6},
        {"kv_blocks": 10**6, "max_model_len": 100},
        {"kv_blocks": 3},
        {"kv_blocks": 3, "max_model_len": 100},
        {"kv_blocks": 1, "block_size": 1, "max_model_len": 50},
        {"max_model_len": 512},
        {"max_model_len": 512, "kv_memory": 0.1},
        {"max_model_len": 40, "kv_memory": 0.01},
        {"max_model_len": 512, "kv_memory": 0.9, "block_size": 255},
        {"kv_memory": 0.001},
    ],
)
@pytest.mark.parametrize("memory", [13_000_000, 14_000_000, 17_000_000])
def test_advice_works(launch: Callable[..., Engine], gpu: FakeGPU, memory: int, settings: dict[str, Any]) -> None:
    """Whatever a message says to use instead is accepted, also where the next start finds a little less memory."""
    gpu.memory = memory
    settings = SIZES | settings
    try:
        launch(**settings)
    except ChatPageError as error:
        said = str(error)
    else:
        return
    ways = advice(said)
    assert said.endswith("use a smaller model.") or all(ways), said
    for way in filter(None, ways):
        better = settings | {name: value if value < 1 else int(value) for name, value in way.items()}
        gpu.memory = memory * 99 // 100
        assert launch(**better).status == "ready", (way, said)
