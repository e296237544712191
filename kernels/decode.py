"""Paged attention of single queries, each to its own blocks.

    row 0  ├──── shared with others ────┼─ task 0 ─┼─ task 1 ─┤        one program per task and KV head
    row 1  ├──── shared with others ────┼─ task 2 ─┤

The query heads that share a KV head are the rows of one matrix, so that each key is read once for all of them. A long row
is split into several tasks [1]; whichever of its programs ends last merges what they found, and what the shared keys gave
(see `chatpage.kernels.shared`).

    [1] Dao et al., Flash-Decoding, 2023.
"""

import triton
import triton.language as tl
from chatpage.kernels.softmax import Left, answer, attend, empty, leave, merge, tile
from torch import Tensor

KEYS = 64  # of a program at once
WARPS = 4
STAGES = 3  # of loads that run ahead


@triton.jit
def _decode(
    query, keys, values, tables, tasks, rows, out, sinks,
    answers, sums, arrived, shared_answers, shared_sums,
    query_stride, head_stride, table_stride, scaling, softcap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    SHARED_ROWS: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    kv_head, task = tl.program_id(0), tl.program_id(1)
    row = tl.load(tasks + task * 4)
    if row < 0:
        return
    begin, end = tl.load(tasks + task * 4 + 1), tl.load(tasks + task * 4 + 2)
    first_task, splits = tl.load(rows + row * 8), tl.load(rows + row * 8 + 1)
    first_shared, shared, place = tl.load(rows + row * 8 + 2), tl.load(rows + row * 8 + 3), tl.load(rows + row * 8 + 4)
    token = row.to(tl.int64)

    member = tl.arange(0, ROWS)
    present = member < GROUP
    head = kv_head * GROUP + member
    column = tl.arange(0, KEY_TILE)
    asked = tl.load(
        query + token * query_stride + head[:, None] * head_stride + column[None, :],
        mask=present[:, None] & (column < KEY_SIZE)[None, :],
        other=0.0,
    )
    state = empty(ROWS, VALUE_TILE)
    for start in tl.range(begin, end, KEYS):
        positions = start + tl.arange(0, KEYS)
        state = attend(
            state, asked, keys + kv_head * KEY_SIZE, values + kv_head * VALUE_SIZE, tables + token * table_stride,
            positions, positions < end, member, member, scaling, softcap,
            KV_HEADS * KEY_SIZE, KV_HEADS * VALUE_SIZE, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE,
            BLOCK_SIZE, CAPPED, MASKED=False,
        )  # fmt: skip

    shared_row = kv_head * SHARED_ROWS + place * GROUP
    if splits == 1:
        state = merge(
            state, shared_answers, shared_sums, first_shared, shared, shared_row + member, present,
            KV_HEADS * SHARED_ROWS, VALUE_SIZE, VALUE_TILE, AT_ONCE=2,
        )  # fmt: skip
        answer(state, sinks, head, out, token * HEADS + head, present, SINKS, VALUE_SIZE, VALUE_TILE)
    else:
        leave(state, answers, sums, task * HEADS + head, present, VALUE_SIZE, VALUE_TILE)
        tl.debug_barrier()  # all of this program's threads have written
        if tl.atomic_add(arrived + row * KV_HEADS + kv_head, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived + row * KV_HEADS + kv_head, 0)  # for the next launch
            few = tl.arange(0, FEW)
            there = few < GROUP
            few_heads = kv_head * GROUP + few
            merged = merge(
                empty(FEW, VALUE_TILE), answers, sums, first_task, splits, few_heads, there,
                HEADS, VALUE_SIZE, VALUE_TILE, AT_ONCE=16,
            )  # fmt: skip
            merged = merge(
                merged, shared_answers, shared_sums, first_shared, shared, shared_row + few, there,
                KV_HEADS * SHARED_ROWS, VALUE_SIZE, VALUE_TILE, AT_ONCE=16,
            )  # fmt: skip
            answer(merged, sinks, few_heads, out, token * HEADS + few_heads, there, SINKS, VALUE_SIZE, VALUE_TILE)


def attend_decodes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    tasks: Tensor,
    rows: Tensor,
    own: Left,
    arrived: Tensor,
    shared: Left,
    out: Tensor,
    *,
    shared_rows: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Answer the first queries of a step: one a row.

    Args:
        query: (tokens, heads, key_size), the last dimension without gaps.
        keys, values: the pool of one layer, (blocks, block_size, kv_heads, key_size or value_size).
        tables: (rows, blocks) of int32.
        tasks: (tasks, 4) of int32: row (−1: none), begin and end of the keys' positions, and nothing.
        rows: (rows, 8) of int32: first task, number of tasks, first shared task, number of shared tasks, the row's place
            in each of them, and nothing.
        own: where a task leaves its state, `heads` rows each.
        arrived: (rows, kv_heads) of int32, zeros; zeros again afterwards.
        shared: what `attend_shared` left, `kv_heads` times `shared_rows` rows a task.
        out: (tokens, heads, value_size), contiguous.
        scaling, softcap, sinks: see `chatpage.model.attention.Attention`.
    """
    _, block_size, kv_heads, key_size = keys.shape
    heads, value_size = query.shape[1], values.shape[3]
    group = heads // kv_heads
    _decode[(kv_heads, len(tasks))](
        query, keys, values, tables, tasks, rows, out, sinks,
        *own, arrived, *shared,
        query.stride(0), query.stride(1), tables.stride(0), scaling, softcap or 0.0,
        heads, kv_heads, group, key_size, value_size, tile(key_size), tile(value_size),
        block_size, softcap is not None, sinks is not None,
        shared_rows, max(16, triton.next_power_of_2(group)), triton.next_power_of_2(group), KEYS,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
