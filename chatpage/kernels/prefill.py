"""Paged attention of chunks: tiles of neighbouring queries, each to all keys before it.

A tile's rows are its queries times the query heads that share a KV head. Keys that all queries of the tile see are
attended to without a mask; the last ones, and under a window the first ones, with it.
"""

import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.softmax import answer, attend, empty, stages, tile

ROWS = 64  # queries times heads that share a KV head, of a program
KEYS = 64  # of a program at once
WARPS = 4
AHEAD = 1  # tiles of keys that are loaded ahead


@triton.jit
def _prefill(
    query, keys, values, tables, tasks, out, sinks,
    query_stride, head_stride, scaling, softcap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    kv_head, task = tl.program_id(0), tl.program_id(1)
    first_token, count = tl.load(tasks + task * 4), tl.load(tasks + task * 4 + 1)
    first_position, table = tl.load(tasks + task * 4 + 2), tables + tl.load(tasks + task * 4 + 3)
    if count == 0:
        return
    index = tl.arange(0, ROWS)
    present = index < count * GROUP
    token = (first_token + index // GROUP).to(tl.int64)
    head = kv_head * GROUP + index % GROUP
    column = tl.arange(0, KEY_TILE)
    asked = tl.load(
        query + (token * query_stride + head * head_stride)[:, None] + column[None, :],
        mask=present[:, None] & (column < KEY_SIZE)[None, :],
        other=0.0,
    )
    last_visible = first_position + tl.minimum(index // GROUP, count - 1)
    end = first_position + count
    if WINDOW:
        first_visible = tl.maximum(last_visible - WINDOW + 1, 0)
        first = tl.maximum(first_position - WINDOW + 1, 0) // KEYS * KEYS
        masked_from = first
    else:
        first_visible = tl.zeros_like(last_visible)
        first = 0
        masked_from = (first_position + 1) // KEYS * KEYS

    state = empty(ROWS, VALUE_TILE)
    for start in tl.range(first, masked_from, KEYS):
        state = attend(
            state, asked, keys + kv_head * KEY_SIZE, values + kv_head * VALUE_SIZE, table,
            start + tl.arange(0, KEYS), end, first_visible, last_visible, scaling, softcap,
            KV_HEADS * KEY_SIZE, KV_HEADS * VALUE_SIZE, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE,
            CAPPED, WHOLE=True, MASKED=False,
        )  # fmt: skip
    for start in tl.range(masked_from, end, KEYS):
        state = attend(
            state, asked, keys + kv_head * KEY_SIZE, values + kv_head * VALUE_SIZE, table,
            start + tl.arange(0, KEYS), end, first_visible, last_visible, scaling, softcap,
            KV_HEADS * KEY_SIZE, KV_HEADS * VALUE_SIZE, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE,
            CAPPED, WHOLE=False, MASKED=True,
        )  # fmt: skip
    answer(state, sinks, head, out, token * HEADS + head, present, SINKS, VALUE_SIZE, VALUE_TILE)


def queries_per_task(heads: int, kv_heads: int) -> int:
    """How many neighbouring queries a task may have."""
    return max(1, ROWS * kv_heads // heads)


def attend_chunks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    tasks: Tensor,
    out: Tensor,
    *,
    window: int | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Answer the queries of chunks.

    Args:
        query, keys, values, tables, out, scaling, softcap, sinks: see `chatpage.kernels.decode.attend_decodes`.
        tasks: (tasks, 4) of int32: index of the first query's token, number of queries (0: no task; at most
            `queries_per_task`), the first query's position, and where the row's table begins in `tables`.
        window: see `chatpage.model.attention.AttentionCall`.
    """
    _, block_size, kv_heads, key_size = keys.shape
    heads, value_size = query.shape[1], values.shape[3]
    rows = max(ROWS, triton.next_power_of_2(heads // kv_heads))
    _prefill[(kv_heads, len(tasks))](
        query, keys, values, tables, tasks, out, sinks,
        query.stride(0), query.stride(1), scaling, softcap or 0.0,
        heads, kv_heads, heads // kv_heads, window or 0, key_size, value_size, tile(key_size), tile(value_size),
        block_size, softcap is not None, sinks is not None, rows, KEYS,
        num_warps=WARPS, num_stages=stages(AHEAD, KEYS, keys, values),
    )  # fmt: skip
