"""The store kernel: keys and values of a step go to their slots, and nothing else changes."""

import pytest
import torch
from torch import Tensor

from chatpage.kernels.store import store
from tests.kernels.case import same_bits
from tests.kernels.conftest import DEVICE, ON_GPU, needs_gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]


def laid_out(layout: str, tokens: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Random keys and values, as they come out of models. The shape is heads, key size and value size."""
    kv_heads, key_size, value_size = shape
    if layout == "side by side":
        heads = 2 * kv_heads
        widths = [heads * key_size, kv_heads * key_size, kv_heads * value_size]
        _, key, value = torch.randn(tokens, sum(widths), device=DEVICE, dtype=dtype).split(widths, dim=1)
        return [key.unflatten(1, (kv_heads, key_size)), value.unflatten(1, (kv_heads, value_size))]
    if layout == "heads first":
        sizes = key_size, value_size
        return [torch.randn(kv_heads, tokens, n, device=DEVICE, dtype=dtype).transpose(0, 1) for n in sizes]
    return [torch.randn(tokens, kv_heads, n, device=DEVICE, dtype=dtype) for n in (key_size, value_size)]


@pytest.mark.parametrize("layout", ["alone", "side by side", "heads first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 80, 96), (2, 96, 80), (8, 128, 128), (1, 256, 32), (5, 24, 8)])
def test_what_has_a_slot_is_stored_and_nothing_else_changes(shape, dtype, layout):
    slots_in_pool = 4000 if ON_GPU else 90
    for tokens in (1, 7, 1000 if ON_GPU else 20):
        torch.manual_seed(tokens)
        key, value = laid_out(layout, tokens, shape, dtype)
        keys = torch.randn(slots_in_pool, shape[0], shape[1], device=DEVICE, dtype=dtype)
        values = torch.full((slots_in_pool, shape[0], shape[2]), torch.nan, device=DEVICE, dtype=dtype)
        slots = torch.randperm(slots_in_pool, device=DEVICE)[:tokens]
        slots[torch.rand(tokens, device=DEVICE) < 0.3] = -1
        slots = slots.to(torch.int32 if tokens == 7 else torch.int64)
        wanted = keys.clone(), values.clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wanted[0][slot], wanted[1][slot] = key[token], value[token]
        given = key.clone(), value.clone()
        store(key, value, keys, values, slots)
        assert same_bits(keys, wanted[0])
        assert same_bits(values, wanted[1])
        assert torch.equal(key, given[0])
        assert torch.equal(value, given[1])


def test_where_no_token_has_a_slot_nothing_changes():
    keys, values = torch.randn(32, 2, 64, device=DEVICE), torch.randn(32, 2, 64, device=DEVICE)
    before = keys.clone(), values.clone()
    key, value = laid_out("alone", 5, (2, 64, 64), torch.float32)
    store(key, value, keys, values, torch.full((5,), -1, device=DEVICE))
    assert same_bits(keys, before[0])
    assert same_bits(values, before[1])


def test_what_is_not_a_number_is_stored_as_it_is():
    """A broken row is found by its logits; its blocks must show it when they are read again."""
    keys, values = torch.zeros(32, 2, 64, device=DEVICE), torch.zeros(32, 2, 64, device=DEVICE)
    key, value = laid_out("alone", 2, (2, 64, 64), torch.float32)
    key[1] = torch.nan
    value[0] = torch.inf
    store(key, value, keys, values, torch.tensor([9, 4], device=DEVICE))
    assert same_bits(keys[[9, 4]], key)
    assert same_bits(values[[9, 4]], value)


@needs_gpu
def test_slots_beyond_two_to_the_31_numbers():
    heads, size = 8, 128
    count = 2**31 // (heads * size) + 1000
    keys = torch.full((count, heads, size), torch.nan, device=DEVICE, dtype=torch.float16)
    values = torch.full((count, heads, size), torch.nan, device=DEVICE, dtype=torch.float16)
    key, value = laid_out("side by side", 4, (heads, size, size), torch.float16)
    slots = torch.tensor([count - 1, 2, -1, count - 999], device=DEVICE)
    store(key, value, keys, values, slots)
    for memory, given in ((keys, key), (values, value)):
        assert torch.equal(memory[slots[[0, 1, 3]]], given[[0, 1, 3]])
        written = ~memory[:, 0, 0].isnan()
        assert written.nonzero().flatten().tolist() == [2, count - 999, count - 1]
        assert int(memory.isnan().sum(dtype=torch.int64)) == (count - 3) * heads * size
