"""The running softmax that all attention kernels share.

A state is what some of the keys gave a tile of queries: (largest, total, weighted), where with scores s in base 2
largest = max s, total = Σ 2^(s − largest) and weighted = Σ 2^(s − largest) · value. States of different keys can be
merged in any order, so keys can be split among programs [1, 2].

    [1] Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
    [2] Dao et al., FlashAttention, 2022; Juravsky et al., Hydragen, 2024, for a prefix that many queries share.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.target import shared_memory

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Left(NamedTuple):
    """Where programs leave their states for `chatpage.kernels.merge`.

    Attributes:
        answers: (rows, value_size), weighted / total: the answer as if these were all keys.
        sums: (rows,) of float32: largest + log2 total.
    """

    answers: Tensor
    sums: Tensor


def tile(size: int) -> int:
    """How wide a tile of this many numbers is."""
    return max(16, triton.next_power_of_2(size))


def stages(ahead: int, count: int, keys: Tensor, values: Tensor) -> int:
    """Triton's number of stages for a loop of `attend`, of which so many tiles of keys and values are loaded ahead.

    Fewer, but at least one, where those of two such programs would not fit into a multiprocessor's memory. A tile
    counts twice, since the numbers of its blocks are loaded before it.

    Args:
        count: keys of a tile.
        keys, values: the pool of one layer.
    """
    bytes_of_tile = count * (tile(keys.shape[3]) + tile(values.shape[3])) * keys.element_size()
    return 1 + 2 * max(1, min(ahead, shared_memory() // 2 // bytes_of_tile))


@triton.jit
def empty(ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The state of no keys at all."""
    return (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, SIZE], tl.float32),
    )


@triton.jit
def capped(scores, softcap, CAPPED: tl.constexpr):
    """softcap * tanh(scores / softcap), by exponentials, which do not overflow."""
    if CAPPED:
        small = tl.exp(-2 * tl.abs(scores) / softcap)
        size = softcap * (1 - small) / (1 + small)
        scores = tl.where(scores < 0, -size, size)
    return scores


@triton.jit
def _gather(pool, slots, ROW: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The numbers (slots, TILE) of some slots, zeros behind the first SIZE."""
    column = tl.arange(0, TILE)
    at = pool + slots[:, None] * ROW + column[None, :]
    if SIZE < TILE:
        return tl.load(at, mask=(column < SIZE)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def attend(
    state, query, keys, values, table, positions, end, first_visible, last_visible, scaling, softcap,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    CAPPED: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state after some more keys.

    Args:
        query: (queries, KEY_TILE).
        keys, values: the pool at the right head; KEY_ROW and VALUE_ROW numbers lie between two slots.
        table: of the sequence.
        positions, end: of the keys. Those from `end` on do not count; WHOLE says that there are none.
        first_visible, last_visible: (queries,) positions that each query sees; looked at only where MASKED.
    """
    largest, total, weighted = state
    read = positions if WHOLE else tl.minimum(positions, end - 1)  # no mask, so that loads can run ahead
    slots = tl.load(table + read // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + read % BLOCK_SIZE
    key = _gather(keys, slots, KEY_ROW, KEY_SIZE, KEY_TILE)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
    scores = capped(scores, softcap, CAPPED) * LOG2_E
    if MASKED:
        visible = (positions[None, :] >= first_visible[:, None]) & (positions[None, :] <= last_visible[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    elif not WHOLE:
        scores = tl.where((positions < end)[None, :], scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(new == float("-inf"), 0.0, new) if MASKED else new  # a query may see none of these keys
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(largest - shift)
    value = _gather(values, slots, VALUE_ROW, VALUE_SIZE, VALUE_TILE)
    weighted = tl.dot(weights.to(value.dtype), value, weighted * fade[:, None], input_precision="ieee")
    return new, total * fade + tl.sum(weights, 1), weighted


@triton.jit
def leave(state, answers, sums, row, present, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Write a state down (see `Left`)."""
    largest, total, weighted = state
    column = tl.arange(0, TILE)
    answer = weighted / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        answers + row.to(tl.int64)[:, None] * SIZE + column[None, :],
        answer.to(answers.dtype.element_ty),
        mask=present[:, None] & (column < SIZE)[None, :],
    )
    tl.store(sums + row, largest + tl.log2(total), mask=present)


@triton.jit
def answer(
    state, sinks, head, out, row, present,
    SINKS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write what the attention gives, into rows of `out`. A sink takes its share first (see `AttentionCall`)."""
    largest, total, weighted = state
    if SINKS:
        sink = tl.load(sinks + head, mask=present, other=float("-inf")).to(tl.float32) * LOG2_E
        new = tl.maximum(largest, sink)
        shift = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(largest - shift)
        total, weighted = total * fade + tl.exp2(sink - shift), weighted * fade[:, None]
    column = tl.arange(0, TILE)
    tl.store(
        out + row[:, None] * SIZE + column[None, :],
        (weighted / tl.where(present, total, 1.0)[:, None]).to(out.dtype.element_ty),
        mask=present[:, None] & (column < SIZE)[None, :],
    )
