"""What enters a recorded step, from the numbers of its frame: wider integers, and tokens that only the device knows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 256  # numbers of a program


@triton.jit
def _widen(
    given, sources, positions, sampled, drawn, tokens, wide_positions, wide_sampled, count, rows, TILE: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < count
    source = tl.load(sources + at, mask=inside, other=-1)
    there = tl.load(drawn + source, mask=source >= 0, other=0)
    here = tl.load(given + at, mask=inside, other=0).to(tl.int64)
    tl.store(tokens + at, tl.where(source >= 0, tl.maximum(there, 0), here), mask=inside)
    tl.store(wide_positions + at, tl.load(positions + at, mask=inside, other=0).to(tl.int64), mask=inside)
    tl.store(wide_sampled + at, tl.load(sampled + at, mask=at < rows, other=0).to(tl.int64), mask=at < rows)


def widen(
    given: Tensor, sources: Tensor, positions: Tensor, sampled: Tensor, drawn: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions and sampled tokens as int64.

    Args:
        given, sources, positions: (tokens,) of int32; where a source is not −1, the token is `drawn[source]` instead.
        sampled: (rows,) of int32.
        drawn: of int64; −1 where there is none, and any token will do.
    """
    tokens, wide_positions, wide_sampled = (
        torch.empty_like(numbers, dtype=torch.int64) for numbers in (given, positions, sampled)
    )
    _widen[(triton.cdiv(max(len(given), len(sampled)), TILE),)](
        given, sources, positions, sampled, drawn, tokens, wide_positions, wide_sampled,
        len(given), len(sampled), TILE,
    )  # fmt: skip
    return tokens, wide_positions, wide_sampled
