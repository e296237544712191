"""Between the product that gives queries, keys and values, and attention: norms of heads, RoPE, and the store.

    heads of a token    q0 q1 q2 q3 │ k0 k1 │ v0 v1          one program a head
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
):  # fmt: skip
    let_the_next_one_begin()
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, TILE)
    inside = at < SIZE
    source = heads + token * (HEADS + 2 * KV_HEADS) * SIZE + head * SIZE
    slot = tl.load(slots + token).to(tl.int64)
    wait_for_the_one_before()
    numbers = tl.load(source + at, mask=inside, other=0.0)
    if head >= HEADS + KV_HEADS:
        if slot >= 0:
            tl.store(values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * SIZE + at, numbers, mask=inside)
        return
    other = (at + SIZE // 2) % SIZE
    turned, across = numbers.to(tl.float32), tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(turned * turned, 0) / SIZE + epsilon)
        is_query, is_key = at < tl.where(head < HEADS, SIZE, 0), at < tl.where(head < HEADS, 0, SIZE)
        weight = tl.load(query_norm + at, mask=is_query, other=0.0) + tl.load(key_norm + at, mask=is_key, other=0.0)
        turned = (turned * scale * weight).to(numbers.dtype).to(tl.float32)
        weight = tl.load(query_norm + other, mask=is_query, other=0.0) + tl.load(
            key_norm + other, mask=is_key, other=0.0
        )
        across = (across * scale * weight).to(numbers.dtype).to(tl.float32)
    turned = turned * tl.load(cos + token * SIZE + at, mask=inside, other=0.0)
    turned += across * tl.load(sin + token * SIZE + at, mask=inside, other=0.0)
    turned = turned.to(numbers.dtype)
    if head < HEADS:
        tl.store(query + (token * HEADS + head) * SIZE + at, turned, mask=inside)
    elif slot >= 0:
        tl.store(keys + (slot * KV_HEADS + head - HEADS) * SIZE + at, turned, mask=inside)


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
    _turn_and_store[(count, tokens)](
        heads, turn.cos, turn.sin, turn.query_norm, turn.key_norm, slots, query, keys, values, turn.epsilon,
        count - 2 * kv_heads, kv_heads, size, triton.next_power_of_2(size), norms,
        num_warps=1, **launched_early(),
    )  # fmt: skip
    return query
