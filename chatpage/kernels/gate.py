"""The gate of a feed-forward part: SiLU(gate) times up."""

import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.target import launched_early, wait_for_the_one_before

TILE = 1024  # numbers of a program


@triton.jit
def _gate(both, out, SIZE: tl.constexpr, TILE: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < SIZE
    wait_for_the_one_before()
    gate = tl.load(both + token * 2 * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + token * 2 * SIZE + SIZE + at, mask=inside, other=0.0)
    opened = (gate / (1 + tl.exp(-gate))).to(up.dtype)
    tl.store(out + token * SIZE + at, opened * up, mask=inside)


def gate(both: Tensor) -> Tensor:
    """(tokens, size) of gate and up side by side, (tokens, 2 * size), contiguous."""
    tokens, size = both.shape[0], both.shape[1] // 2
    out = both.new_empty(tokens, size)
    _gate[(triton.cdiv(size, TILE), tokens)](both, out, size, TILE, num_warps=4, **launched_early())
    return out
