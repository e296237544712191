"""The answers of decodes that more than one task attended for, from the states that those left."""

import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.softmax import Left, answer, empty, tile
from chatpage.kernels.target import launched_early, wait_for_the_one_before

FEW, MANY = 4, 32  # states that a program reads at once


@triton.jit
def _merged(
    state, answers, sums, first, count, row, stride, SIZE: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """The state of one row with `count` more: row `row` of what each task from `first` on left.

    `stride` rows lie between two tasks.
    """
    largest, total, weighted = state
    column = tl.arange(0, TILE)
    for begin in tl.range(0, count, AT_ONCE):
        task = begin + tl.arange(0, AT_ONCE)
        at = (first + task).to(tl.int64) * stride + row
        theirs = tl.load(sums + at, mask=task < count, other=float("-inf"))
        there = (task < count)[:, None] & (column < SIZE)[None, :]
        found = tl.load(answers + at[:, None] * SIZE + column[None, :], mask=there, other=0.0).to(tl.float32)
        new = tl.maximum(largest, tl.max(theirs, 0))
        weights, fade = tl.exp2(theirs - new), tl.exp2(largest - new)
        weighted = weighted * fade[:, None] + tl.sum(weights[:, None] * found, 0)[None, :]
        total = total * fade + tl.sum(weights, 0)
        largest = new
    return largest, total, weighted


@triton.jit
def _merge(
    rows, own_answers, own_sums, shared_answers, shared_sums, sinks, out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SHARED_ROWS: tl.constexpr, SINKS: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1)
    first_own, own = tl.load(rows + row * 8), tl.load(rows + row * 8 + 1)
    first_shared, shared, place = tl.load(rows + row * 8 + 2), tl.load(rows + row * 8 + 3), tl.load(rows + row * 8 + 4)
    wait_for_the_one_before()
    if own + shared <= 1:
        return  # it is answered already, or there is no such row
    group: tl.constexpr = HEADS // KV_HEADS
    state = _merged(
        empty(1, TILE), own_answers, own_sums, first_own, own, head, HEADS, SIZE, TILE, AT_ONCE
    )  # fmt: skip
    state = _merged(
        state, shared_answers, shared_sums, first_shared, shared,
        head // group * SHARED_ROWS + place * group + head % group, KV_HEADS * SHARED_ROWS, SIZE, TILE, AT_ONCE,
    )  # fmt: skip
    heads = head + tl.arange(0, 1)
    answer(state, sinks, heads, out, row.to(tl.int64) * HEADS + heads, heads >= 0, SINKS, SIZE, TILE)


def merge(
    rows: Tensor,
    own: Left,
    shared: Left,
    out: Tensor,
    *,
    kv_heads: int,
    shared_rows: int,
    many: bool,
    sinks: Tensor | None,
) -> None:
    """Answer those first queries of a step that more than one task attended for.

    Args:
        rows: (rows, 8) of int32: first task, number of tasks, first shared task, number of shared tasks, the row's
            place in each of them, and nothing.
        own, shared: what `attend_decodes` and `attend_shared` left. One of them is the launch before this one on its
            stream; for the other, if it ran beside that, the stream waits.
        out: (tokens, heads, value_size), contiguous.
        many: whether to expect rows with many tasks.
        kv_heads, shared_rows, sinks: see there.
    """
    heads, value_size = out.shape[1:]
    _merge[(heads, len(rows))](
        rows, *own, *shared, sinks, out,
        heads, kv_heads, shared_rows, sinks is not None,
        value_size, tile(value_size), MANY if many else FEW,
        num_warps=1, **launched_early(),
    )  # fmt: skip
