"""Paged attention of single queries, each to its own blocks.

    row 0  ├──── shared with others ────┼─ task 0 ─┼─ task 1 ─┤       one program per task and KV head
    row 1  ├──── shared with others ────┼─ task 2 ─┤

The query heads that share a KV head are the rows of one matrix, so that each key is read once for all of them. A long
row is split into several tasks (Dao et al., Flash-Decoding, 2023).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.softmax import Left, answer, attend, empty, leave, stages, tile
from chatpage.kernels.target import launched_early, let_the_next_one_begin, wait_for_the_one_before


class Shape(NamedTuple):
    """Of a program: keys at once, warps, and tiles of keys that are loaded ahead."""

    keys: int
    warps: int
    ahead: int


# Measured on an H200 with heads of 128 numbers (`benchmarks/RESULTS.md`): what is fastest where these programs have the
# GPU to themselves, and beside those that attend to shared keys, where each may take less the more they are.
ALONE, BESIDE, CROWDED = Shape(32, 1, 3), Shape(16, 1, 2), Shape(32, 1, 1)
CROWD = 1024  # rows with each of their KV heads, those included that a recorded step has room for


def is_crowd(rows: int, kv_heads: int) -> bool:
    """Whether so many rows would leave no room for those that attend to shared keys, if they came first."""
    return rows * kv_heads >= CROWD


@triton.jit
def _decode(
    query, keys, values, tables, tasks, rows, out, sinks, answers, sums,
    query_stride, head_stride, scaling, softcap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    let_the_next_one_begin()
    kv_head, task = tl.program_id(0), tl.program_id(1)
    row, begin = tl.load(tasks + task * 4), tl.load(tasks + task * 4 + 1)
    end, table = tl.load(tasks + task * 4 + 2), tables + tl.load(tasks + task * 4 + 3)
    is_alone = tl.load(rows + row * 8 + 1) + tl.load(rows + row * 8 + 3) == 1
    wait_for_the_one_before()
    if begin == end:
        return

    group: tl.constexpr = HEADS // KV_HEADS
    member = tl.arange(0, ROWS)
    present = member < group
    head = kv_head * group + member
    column = tl.arange(0, KEY_TILE)
    asked = tl.load(
        query + row.to(tl.int64) * query_stride + head[:, None] * head_stride + column[None, :],
        mask=present[:, None] & (column < KEY_SIZE)[None, :],
        other=0.0,
    )
    state = empty(ROWS, VALUE_TILE)
    for start in tl.range(begin, end, KEYS):
        state = attend(
            state, asked, keys + kv_head * KEY_SIZE, values + kv_head * VALUE_SIZE, table,
            start + tl.arange(0, KEYS), end, member, member, scaling, softcap,
            KV_HEADS * KEY_SIZE, KV_HEADS * VALUE_SIZE, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE,
            CAPPED, WHOLE=False, MASKED=False,
        )  # fmt: skip
    if is_alone:
        answer(state, sinks, head, out, row.to(tl.int64) * HEADS + head, present, SINKS, VALUE_SIZE, VALUE_TILE)
    else:
        leave(state, answers, sums, task * HEADS + head, present, VALUE_SIZE, VALUE_TILE)


def attend_decodes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    tasks: Tensor,
    rows: Tensor,
    left: Left,
    out: Tensor,
    *,
    beside: bool,
    early: bool,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Attend for the first queries of a step, one a row: answer, or leave states where a row is not done by one task.

    Args:
        query: (tokens, heads, key_size), the last dimension without gaps.
        keys, values: the pool of one layer, (blocks, block_size, kv_heads, key_size or value_size).
        tables: int32: block tables, one behind the other.
        tasks: (tasks, 4) of int32: row, positions of the first key and behind the last one (the same: no task), and
            where the row's table begins in `tables`.
        rows: see `chatpage.kernels.merge.merge`.
        left: where a task leaves its states, `heads` rows each.
        out: (tokens, heads, value_size), contiguous.
        beside: whether `attend_shared` runs at the same time.
        early: whether to begin before the kernel before it, on the same stream, has ended.
        scaling, softcap, sinks: see `chatpage.model.attention.AttentionCall`.
    """
    _, block_size, kv_heads, key_size = keys.shape
    heads, value_size = query.shape[1], values.shape[3]
    shape = ALONE if not beside else CROWDED if is_crowd(len(rows), kv_heads) else BESIDE
    _decode[(kv_heads, len(tasks))](
        query, keys, values, tables, tasks, rows, out, sinks, *left,
        query.stride(0), query.stride(1), scaling, softcap or 0.0,
        heads, kv_heads, key_size, value_size, tile(key_size), tile(value_size),
        block_size, softcap is not None, sinks is not None,
        max(16, triton.next_power_of_2(heads // kv_heads)), shape.keys,
        num_warps=shape.warps, num_stages=stages(shape.ahead, shape.keys, keys, values),
        **(launched_early() if early else {}),
    )  # fmt: skip
