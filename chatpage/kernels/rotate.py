"""Between the product that gives queries, keys and values, and attention: norms of heads, RoPE, and the store.

    heads of a token    q0 q1 q2 q3 │ k0 k1 │ v0 v1          a program for eight heads
                        norm, RoPE  │ too   │
                            ▼          ▼       ▼
                        queries      slots of the pool

RoPE turns each half of a head against the other (Su et al., RoFormer, 2021, in the order of Llama's weights).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.target import launched_early, let_the_next_one_begin, wait_for_the_one_before

AT_ONCE = 8  # heads of a program


class Turn(NamedTuple):
    """How heads are turned.

    Attributes:
        cos, sin: (tokens, head_size), contiguous; of the sines the first half negative, as the other half enters with.
        query_norm, key_norm: (head_size,), weights of the norm before it, where there is one.
        epsilon: of that norm.
    """

    cos: Tensor
    sin: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    epsilon: float = 0.0


@triton.jit
def _turn_and_store(
    heads, cos, sin, query_norm, key_norm, slots, query, keys, values, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, NORMS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    let_the_next_one_begin()
    token = tl.program_id(1).to(tl.int64)
    head, at = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE), tl.arange(0, TILE)
    slot = tl.load(slots + token).to(tl.int64)
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_inside = at < SIZE
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & is_inside[None, :]
    other = (at + SIZE // 2) % SIZE
    source = heads + (token * (HEADS + 2 * KV_HEADS) + head[:, None]) * SIZE
    wait_for_the_one_before()
    numbers = tl.load(source + at[None, :], mask=inside, other=0.0)
    turned = numbers.to(tl.float32)
    across = tl.load(source + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(turned * turned, 1) / SIZE + epsilon)[:, None]
        turned = (turned * scale * _weights(query_norm, key_norm, is_query, at, is_inside)).to(numbers.dtype)
        across = (across * scale * _weights(query_norm, key_norm, is_query, other, is_inside)).to(numbers.dtype)
        turned, across = turned.to(tl.float32), across.to(tl.float32)
    turned = turned * tl.load(cos + token * SIZE + at, mask=is_inside, other=0.0)[None, :]
    turned += across * tl.load(sin + token * SIZE + at, mask=is_inside, other=0.0)[None, :]
    turned = turned.to(numbers.dtype)
    tl.store(query + (token * HEADS + head[:, None]) * SIZE + at[None, :], turned, mask=inside & is_query[:, None])
    if slot >= 0:
        row = slot * KV_HEADS + head[:, None] - HEADS
        tl.store(keys + row * SIZE + at[None, :], turned, mask=inside & is_key[:, None])
        tl.store(values + (row - KV_HEADS) * SIZE + at[None, :], numbers, mask=inside & is_value[:, None])


@triton.jit
def _weights(query_norm, key_norm, is_query, at, is_inside):
    """Of the norm of each head, (heads, numbers)."""
    of_query = tl.load(query_norm + at, mask=is_inside, other=0.0)[None, :]
    return tl.where(is_query[:, None], of_query, tl.load(key_norm + at, mask=is_inside, other=0.0)[None, :])


def turn_and_store(heads: Tensor, turn: Turn, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Queries (tokens, heads, head_size), turned; the turned keys and the values go into the pool.

    Args:
        heads: (tokens, heads + 2 * kv_heads, head_size), contiguous: queries, keys, values.
        keys, values: the pool of one layer, (blocks, block_size, kv_heads, head_size).
        slots: (tokens,), integers; nothing of a token with slot −1 is stored.
    """
    tokens, count, size = heads.shape
    kv_heads = keys.shape[2]
    query = heads.new_empty(tokens, count - 2 * kv_heads, size)
    norms = turn.query_norm is not None
    _turn_and_store[(triton.cdiv(count, AT_ONCE), tokens)](
        heads, turn.cos, turn.sin, turn.query_norm, turn.key_norm, slots, query, keys, values, turn.epsilon,
        count - 2 * kv_heads, kv_heads, size, triton.next_power_of_2(size), norms, AT_ONCE,
        num_warps=1, **launched_early(),
    )  # fmt: skip
    return query
