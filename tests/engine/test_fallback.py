"""Where kernels or recorded steps do not work, the engine does without them and says so; or refuses, if it must not."""

from collections.abc import Callable

import pytest

from chatpage.engine import Engine
from chatpage.errors import SettingError
from tests.engine.gpu import FakeGPU
from tests.engine.harness import ask, read

BROKEN = RuntimeError("no compiler for sm_12\n  at line 7\n")


def answer(engine: Engine) -> list[int]:
    return read(ask(engine, "What is a block?")).tokens


def test_the_kernels_need_a_gpu(launch: Callable[..., Engine]) -> None:
    with pytest.raises(SettingError) as caught:
        launch(attention="triton")
    assert str(caught.value) == "--attention is triton, which needs a CUDA GPU; use auto or reference."


@pytest.mark.parametrize(
    ("gpu", "done", "note"),
    [
        (FakeGPU(), ["kernels", "try 2048 recorded", "pool", "record"], None),
        (
            FakeGPU(kernels=BROKEN),
            ["kernels", "try 2048", "pool"],
            "Attention is computed by plain PyTorch, which is slow: no compiler for sm_12.",
        ),
        (
            FakeGPU(kernels=ImportError("No module named 'triton'")),
            ["kernels", "try 2048", "pool"],
            "Attention is computed by plain PyTorch, which is slow: No module named 'triton'.",
        ),
        (
            FakeGPU(recording=RuntimeError("")),
            ["kernels", "try 2048 recorded", "try 2048", "pool", "compile 320"],
            "This model's steps cannot be recorded as graphs, so they are slow: RuntimeError.",
        ),
    ],
    ids=["all works", "no kernels", "no Triton", "no graphs"],
)
def test_what_does_not_work_is_done_without_and_noted(
    gpu: FakeGPU,
    done: list[str],
    note: str | None,
    launch: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = answer(launch())
    gpu.install(monkeypatch)
    engine = launch()
    assert gpu.log == done
    assert engine.notes == ([note] if note else [])
    assert answer(engine) == alone


def test_kernels_that_were_asked_for_are_not_done_without(
    launch: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGPU(kernels=BROKEN).install(monkeypatch)
    with pytest.raises(SettingError) as caught:
        launch(attention="triton")
    assert str(caught.value) == "--attention is triton, but no compiler for sm_12; use auto or reference."


def test_plain_attention_that_was_asked_for_tries_no_kernels(
    launch: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGPU()
    gpu.install(monkeypatch)
    engine = launch(attention="reference")
    assert (gpu.log, engine.notes) == (["try 2048", "pool"], [])
    assert answer(engine)
