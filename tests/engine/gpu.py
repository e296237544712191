"""A GPU that is none: the engine takes it for one, and a CPU computes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from chatpage import core
from chatpage.model.load import LoadedModel
from chatpage.model.step import ModelRunner

GPU = torch.device("cuda", 0)


@dataclass
class FakeGPU:
    """What is done on it, and what it cannot do.

    Attributes:
        kernels: what compiling the kernels raises.
        recording: what recording steps raises.
        free: bytes.
        log: what the engine had it do, in order.
    """

    kernels: Exception | None = None
    recording: Exception | None = None
    free: int = 2**30
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

            def record_steps(self, *, max_tokens: int, max_blocks: int, say: Callable[[str], None]) -> None:
                gpu.do("record", gpu.recording)

        monkeypatch.setattr(core, "load", load_there)
        monkeypatch.setattr(core, "ModelRunner", Runner)
        monkeypatch.setattr(core, "free_memory", lambda device: self.free)

    def do(self, what: str, error: Exception | None) -> None:
        self.log.append(what)
        if error:
            raise error
