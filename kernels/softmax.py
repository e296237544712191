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

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Left(NamedTuple):
    """Where programs leave their states (see `leave`).

    Attributes:
        answers: (rows, value_size) of float32.
        sums: (rows,) of float32.
    """

    answers: Tensor
    sums: Tensor


def tile(size: int) -> int:
    """How wide a tile of this many numbers is."""
    return max(16, triton.next_power_of_2(size))


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
def attend(
    state, query, keys, values, table, positions, inside, first_visible, last_visible,
    scaling, softcap,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state after some more keys.

    Args:
        query: (queries, KEY_TILE).
        keys, values: the pool at the right head; KEY_ROW and VALUE_ROW numbers lie between two slots.
        table: of the sequence.
        positions, inside: of the keys, and which of them there are: the others are not read.
        first_visible, last_visible: (queries,) positions; looked at only where MASKED.
    """
    largest, total, weighted = state
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
    column = tl.arange(0, KEY_TILE)
    key = tl.load(
        keys + slots[None, :] * KEY_ROW + column[:, None],
        mask=inside[None, :] & (column < KEY_SIZE)[:, None],
        other=0.0,
    )
    scores = capped(tl.dot(query, key, input_precision="ieee") * scaling, softcap, CAPPED) * LOG2_E
    if MASKED:
        visible = (positions[None, :] >= first_visible[:, None]) & (positions[None, :] <= last_visible[:, None])
        scores = tl.where(visible & inside[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # a query may see none of these keys
    else:
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        shift = new
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(largest - shift)
    column = tl.arange(0, VALUE_TILE)
    value = tl.load(
        values + slots[:, None] * VALUE_ROW + column[None, :],
        mask=inside[:, None] & (column < VALUE_SIZE)[None, :],
        other=0.0,
    )
    weighted = tl.dot(weights.to(value.dtype), value, weighted * fade[:, None], input_precision="ieee")
    return new, total * fade + tl.sum(weights, 1), weighted


@triton.jit
def merge(
    state, answers, sums, first, count, row, present, stride,
    SIZE: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The state after what `count` tasks from `first` on left behind (see `leave`); `stride` rows lie between two tasks.

    What other programs of the same launch left is read from the second-level cache: the first one may be stale.
    """
    largest, total, weighted = state
    column = tl.arange(0, TILE)
    for begin in range(0, count, AT_ONCE):
        task = begin + tl.arange(0, AT_ONCE)
        there = (task < count)[:, None] & present[None, :]
        at = (first + task).to(tl.int64)[:, None] * stride + row[None, :]
        theirs = tl.load(sums + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        answer = tl.load(
            answers + at[:, :, None] * SIZE + column[None, None, :],
            mask=there[:, :, None] & (column < SIZE)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new = tl.maximum(largest, tl.max(theirs, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weights, fade = tl.exp2(theirs - shift[None, :]), tl.exp2(largest - shift)
        weighted = weighted * fade[:, None] + tl.sum(weights[:, :, None] * answer, 0)
        total = total * fade + tl.sum(weights, 0)
        largest = new
    return largest, total, weighted


@triton.jit
def leave(state, answers, sums, row, present, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Write a state down for `merge`: the answer as if these were all keys, and the logarithm of the total."""
    largest, total, weighted = state
    column = tl.arange(0, TILE)
    answer = weighted / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        answers + row.to(tl.int64)[:, None] * SIZE + column[None, :],
        answer,
        mask=present[:, None] & (column < SIZE)[None, :],
    )
    tl.store(sums + row, largest + tl.log2(total), mask=present)


@triton.jit
def answer(
    state, sinks, head, out, row, present,
    SINKS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write what the attention gives, into rows of `out`. A sink takes its share first (see `Attention.attend`)."""
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
