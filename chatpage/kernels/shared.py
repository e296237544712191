"""Attention of many single queries to the blocks that their tables begin with: read once for all of them.

    row 0   ├── block 3 ── block 4 ──┼ own …       the queries of rows 0, 1, 2 become one matrix, and each tile of
    row 1   ├── block 3 ── block 4 ──┼ own …       them meets each key once, as in a prefill without a mask
    row 2   ├── block 3 ── block 4 ──┼ own …

The states stay in memory, to be merged with what each row's own keys give (Juravsky et al., Hydragen, 2024; Ye et al.,
Cascade Inference, 2024). A task is a tile of rows and a stretch of the shared keys, a multiple of KEYS.
"""

import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.softmax import Left, attend, empty, leave, stages, tile
from chatpage.kernels.target import launched_early, let_the_next_one_begin, wait_for_the_one_before

KEYS = 64  # of a program at once
WARPS = 4
AHEAD = 2  # tiles that are loaded ahead
LARGE = 128  # a tile of so many rows leaves no room for that


@triton.jit
def _shared(
    query, keys, values, tables, tasks, members, answers, sums,
    query_stride, head_stride, scaling, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    let_the_next_one_begin()
    kv_head, task = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(tasks + task * 8), tl.load(tasks + task * 8 + 1)
    begin, end = tl.load(tasks + task * 8 + 2), tl.load(tasks + task * 8 + 3)
    table = tables + tl.load(tasks + task * 8 + 4)
    wait_for_the_one_before()
    if count == 0:
        return
    index = tl.arange(0, ROWS)
    present = index < count * GROUP
    token = tl.load(members + first + index // GROUP, mask=present, other=0).to(tl.int64)
    head = kv_head * GROUP + index % GROUP
    column = tl.arange(0, KEY_TILE)
    asked = tl.load(
        query + (token * query_stride + head * head_stride)[:, None] + column[None, :],
        mask=present[:, None] & (column < KEY_SIZE)[None, :],
        other=0.0,
    )
    state = empty(ROWS, VALUE_TILE)
    for start in tl.range(begin, end, KEYS):
        state = attend(
            state, asked, keys + kv_head * KEY_SIZE, values + kv_head * VALUE_SIZE, table,
            start + tl.arange(0, KEYS), end, index, index, scaling, softcap,
            KV_HEADS * KEY_SIZE, KV_HEADS * VALUE_SIZE, KEY_SIZE, VALUE_SIZE, KEY_TILE, VALUE_TILE, BLOCK_SIZE,
            CAPPED, WHOLE=True, MASKED=False,
        )  # fmt: skip
    leave(state, answers, sums, (task * KV_HEADS + kv_head) * ROWS + index, present, VALUE_SIZE, VALUE_TILE)


def attend_shared(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    tasks: Tensor,
    members: Tensor,
    left: Left,
    *,
    shared_rows: int,
    early: bool,
    scaling: float,
    softcap: float | None,
) -> None:
    """Attend to shared keys, and leave the states for `chatpage.kernels.merge.merge`.

    Args:
        query, keys, values, tables, scaling, softcap: see `chatpage.kernels.decode.attend_decodes`.
        tasks: (tasks, 8) of int32: index of the first member, number of members (0: no task), positions of the first
            key and behind the last one, multiples of KEYS apart, where the members' table begins, and nothing.
        members: rows that share, group after group.
        left: where a task leaves its states, `kv_heads` times `shared_rows` rows each.
        shared_rows: of a task's matrix: at least its members times heads / kv_heads; a power of two from 16 on.
        early: see `chatpage.kernels.decode.attend_decodes`.
    """
    _, block_size, kv_heads, key_size = keys.shape
    value_size = values.shape[3]
    _shared[(kv_heads, len(tasks))](
        query, keys, values, tables, tasks, members, *left,
        query.stride(0), query.stride(1), scaling, softcap or 0.0,
        kv_heads, query.shape[1] // kv_heads, key_size, value_size, tile(key_size), tile(value_size),
        block_size, softcap is not None, shared_rows, KEYS,
        num_warps=WARPS, num_stages=2 if shared_rows >= LARGE else stages(AHEAD, KEYS, keys, values),
        **(launched_early() if early else {}),
    )  # fmt: skip
