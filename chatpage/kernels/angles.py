"""Cosines and sines of rotary positions (Su et al., RoFormer, 2021): angle = position · frequency."""

import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.target import launched_early, wait_for_the_one_before


@triton.jit
def _angles(positions, frequencies, cos, sin, scaling, HALF: tl.constexpr, TILE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    inside = at < HALF
    frequency = tl.load(frequencies + at, mask=inside, other=0.0).to(tl.float32)
    wait_for_the_one_before()
    angle = tl.load(positions + token).to(tl.float32) * frequency
    cosine, sine = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    first = token * 2 * HALF + at
    tl.store(cos + first, cosine, mask=inside)
    tl.store(cos + first + HALF, cosine, mask=inside)
    tl.store(sin + first, -sine, mask=inside)
    tl.store(sin + first + HALF, sine, mask=inside)


def angles(positions: Tensor, frequencies: Tensor, scaling: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head_size), the sines of the first half negative: see `chatpage.kernels.rotate.Turn`.

    Args:
        positions: (tokens,), integers.
        frequencies: (head_size / 2,), radians a position.
        scaling: of the results.
        like: has their dtype and device.
    """
    half = len(frequencies)
    cos, sin = (like.new_empty(len(positions), 2 * half) for _ in range(2))
    _angles[(len(positions),)](
        positions, frequencies, cos, sin, scaling, half, triton.next_power_of_2(half), num_warps=1, **launched_early()
    )
    return cos, sin
