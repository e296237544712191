"""What the machine can do at most: the two rates that every limit is computed with."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

RUNS = 10


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured, not read from a data sheet.

    Attributes:
        copy: bytes a second of a large copy from memory to the same memory, read and written both counted.
        products: floating-point operations a second of a large matrix product of random numbers.
    """

    copy: float
    products: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Ceilings":
        found = cls(_copies(device), _products(device, dtype))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def about(self) -> dict[str, str]:
        return {"copy ceiling": f"{self.copy / 1e12:.3g} TB/s", "products": f"{self.products / 1e12:.3g} TFLOP/s"}


def _copies(device: torch.device) -> float:
    size = 2**32 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _products(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of some runs."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return statistics.median(_timed(work) for _ in range(RUNS))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1000


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
