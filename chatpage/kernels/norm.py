"""Root mean square normalisation, and the addition before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.target import launched_early, wait_for_the_one_before


@triton.jit
def _add_and_norm(
    hidden, more, weight, total, normed, epsilon, SIZE: tl.constexpr, TILE: tl.constexpr, ADDS: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, TILE)
    inside = at < SIZE
    row = tl.program_id(0).to(tl.int64) * SIZE
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    wait_for_the_one_before()
    numbers = tl.load(hidden + row + at, mask=inside, other=0.0)
    if ADDS:
        numbers = (numbers.to(tl.float32) + tl.load(more + row + at, mask=inside, other=0.0)).to(numbers.dtype)
        tl.store(total + row + at, numbers, mask=inside)
    wide = numbers.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + epsilon)
    tl.store(normed + row + at, (wide * scale * weights).to(numbers.dtype), mask=inside)


def add_and_norm(hidden: Tensor, more: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """hidden + more, rounded as it is kept, and that over its root mean square, times the weights.

    Args:
        hidden, more: (tokens, size), contiguous; without `more` nothing is added.
        weight: (size,).
    """
    tokens, size = hidden.shape
    total = hidden if more is None else torch.empty_like(hidden)
    normed = torch.empty_like(hidden)
    _add_and_norm[(tokens,)](
        hidden, more, weight, total, normed, epsilon, size, triton.next_power_of_2(size), more is not None,
        num_warps=min(16, max(1, size // 512)), **launched_early(),
    )  # fmt: skip
    return total, normed
