"""A GPU that is none: the engine takes it for one, and a CPU computes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from chatpage import core, startup
from chatpage.model.load import LoadedModel
from chatpage.model.step import ModelRunner

GPU = torch.device("cuda", 0)


@dataclass
class FakeGPU:
    """What is done on it, and what it cannot do.

    Attributes:
        kernels: what compiling the kernels raises.
        recording: what recording a step raises.
        memory: bytes that are free when the model is loaded.
        step: bytes that a step takes for each of its tokens.
        taken: bytes that something else takes once the largest step was tried.
        log: what the engine had it do, in order.
    """

    kernels: Exception | None = None
    recording: Exception | None = None
    memory: int = 2**40
    step: int = 1000
    taken: int = 0
    log: list[str] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have every engine that starts from now on run on it."""
        load, gpu = core.load, self

        def load_there(*args: Any, **kwargs: Any) -> LoadedModel:
            return replace(load(*args, **kwargs), device=GPU)

        class Runner(ModelRunner):
            def __init__(self, loaded: LoadedModel, **sizes: Any) -> None:
                super().__init__(replace(loaded, device=torch.device("cpu")), **sizes)
                self.overlaps = True

            def use_kernels(self) -> None:
                gpu.do("kernels", gpu.kernels)

            def measure_step(self, *, max_tokens: int, max_context: int, recorded: bool) -> int:
                gpu.do(f"try {max_tokens}" + (" recorded" if recorded else ""), gpu.recording if recorded else None)
                gpu.take(max_tokens * gpu.step)
                return max_tokens * gpu.step

            def resize(self, num_blocks: int) -> None:
                gpu.do("pool", None)
                gpu.memory -= gpu.taken
                gpu.take(num_blocks * self.pool.bytes_per_block)
                super().resize(num_blocks)

            def record_steps(self, *, max_tokens: int, max_blocks: int, say: Callable[[str], None]) -> None:
                gpu.do("record", gpu.recording)

            def compile_steps(self, *, max_context: int) -> None:
                gpu.do(f"compile {max_context}", None)
                super().compile_steps(max_context=max_context)

        monkeypatch.setattr(core, "load", load_there)
        monkeypatch.setattr(startup, "ModelRunner", Runner)
        monkeypatch.setattr(startup, "free_memory", lambda device: self.memory)

    def do(self, what: str, error: Exception | None) -> None:
        self.log.append(what)
        if error:
            raise error

    def take(self, count: int) -> None:
        if count > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {count} bytes.")
