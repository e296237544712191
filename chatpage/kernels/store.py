"""Keys and values of new tokens into their slots."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store(
    key, value, keys, values, slots,
    key_stride, value_stride,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, key_head_stride, value_head_stride,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        at = tl.arange(0, KEY_TILE)
        given = key + token.to(tl.int64) * key_stride + at // KEY_SIZE * key_head_stride + at % KEY_SIZE
        tl.store(keys + slot * KEY_ROW + at, tl.load(given, mask=at < KEY_ROW), mask=at < KEY_ROW)
        at = tl.arange(0, VALUE_TILE)
        given = value + token.to(tl.int64) * value_stride + at // VALUE_SIZE * value_head_stride + at % VALUE_SIZE
        tl.store(values + slot * VALUE_ROW + at, tl.load(given, mask=at < VALUE_ROW), mask=at < VALUE_ROW)


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write one layer's keys and values.

    Args:
        key, value: (tokens, kv_heads, key_size or value_size), the last dimension without gaps.
        keys, values: the pool, one row a slot: (slots, kv_heads, key_size or value_size), contiguous.
        slots: (tokens,), integers. A token with slot −1 is skipped.
    """
    key_row, value_row = keys[0].numel(), values[0].numel()
    _store[(len(slots),)](
        key, value, keys, values, slots,
        key.stride(0), value.stride(0),
        key_row, value_row,
        key.shape[2], value.shape[2], key.stride(1), value.stride(1),
        triton.next_power_of_2(key_row), triton.next_power_of_2(value_row),
    )  # fmt: skip
