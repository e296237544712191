"""The kernels before and between products: inputs, angles, norms, the gate, and what happens to heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chatpage.kernels.angles import angles
from chatpage.kernels.gate import gate
from chatpage.kernels.inputs import TILE, widen
from chatpage.kernels.norm import add_and_norm
from chatpage.kernels.rotate import Turn, turn_and_store
from tests.kernels.conftest import DEVICE, ON_GPU

DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3} | ({torch.bfloat16: 3e-2} if ON_GPU else {})
EPSILON = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def assert_near(found: Tensor, expected: Tensor, allowed: float) -> None:
    """By the norm of the difference, which no missing number passes."""
    found, expected = found.double(), expected.double()
    assert (found - expected).norm() <= allowed * expected.norm()


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (5, 3), (TILE + 3, 3), (32, 2 * TILE)])
def test_inputs_are_widened_and_tokens_fetched(tokens: int, rows: int) -> None:
    """A frame has as many rows as there may be sequences, of however few tokens it is."""
    given, positions, sampled = (torch.arange(n, n + count) for n, count in ((100, tokens), (7, tokens), (0, rows)))
    sources = torch.full((tokens,), -1)
    sources[tokens // 2] = 2
    drawn = torch.tensor([9, -1, 5, 8], device=DEVICE)
    numbers = (numbers.to(DEVICE, torch.int32) for numbers in (given, sources, positions, sampled))
    token_ids, *others = widen(*numbers, drawn)
    given[tokens // 2] = 5
    for found, expected in zip((token_ids, *others), (given, positions, sampled), strict=True):
        assert found.dtype == torch.int64
        assert torch.equal(found.cpu(), expected)


def test_a_broken_rows_token_is_any_that_there_is() -> None:
    numbers = [torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (3, 0, 4, 0)]
    token_ids, _, _ = widen(*numbers, torch.tensor([-1], device=DEVICE))
    assert token_ids.tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [32, 40])
def test_angles(half: int, dtype: torch.dtype) -> None:
    positions, frequencies = torch.tensor([0, 1, 77, 40_000]), torch.rand(half)
    exact = (positions[:, None].float() * frequencies).double()  # as models round them
    cos, sin = angles(positions.to(DEVICE), frequencies.to(DEVICE), 1.5, draw(1, dtype=dtype))
    assert cos.dtype == sin.dtype == dtype
    assert_near(cos, 1.5 * exact.cos().repeat(1, 2).to(DEVICE), DTYPES[dtype])
    assert_near(sin, 1.5 * torch.cat([-exact.sin(), exact.sin()], -1).to(DEVICE), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 96, 1000])
def test_add_and_norm(size: int, dtype: torch.dtype) -> None:
    hidden, more, weight = draw(5, size, dtype=dtype), draw(5, size, dtype=dtype), draw(size, dtype=dtype)
    total, normed = add_and_norm(hidden, more, weight, EPSILON)
    assert torch.equal(total, hidden + more)
    exact = total.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()
    assert_near(normed, exact, DTYPES[dtype])


def test_norm_alone() -> None:
    hidden, weight = draw(3, 64), draw(64)
    total, normed = add_and_norm(hidden, None, weight, 0.1)
    assert total is hidden
    assert_near(normed, F.rms_norm(hidden, (64,), weight, 0.1), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 1500])
def test_gate(size: int, dtype: torch.dtype) -> None:
    both = 4 * draw(3, 2 * size, dtype=dtype)
    exact = both.double()
    assert_near(gate(both), F.silu(exact[:, :size]) * exact[:, size:], DTYPES[dtype])


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_turned_and_stored(dtype: torch.dtype, size: int, has_norms: bool) -> None:
    heads, kv_heads, slots = 6, 2, [3, -1, 17, 9]
    given = draw(len(slots), heads + 2 * kv_heads, size, dtype=dtype)
    angles = draw(len(slots), size // 2)
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    norms = (draw(size, dtype=dtype), draw(size, dtype=dtype)) if has_norms else (None, None)
    keys, values = draw(5, 8, kv_heads, size, dtype=dtype), draw(5, 8, kv_heads, size, dtype=dtype)
    before = keys.clone(), values.clone()

    query = turn_and_store(given, Turn(cos, sin, *norms, EPSILON), keys, values, torch.tensor(slots, device=DEVICE))

    def turned(part: Tensor, weight: Tensor | None) -> Tensor:
        exact = part.double()
        if weight is not None:
            exact = exact / (exact.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()
        first, second = exact.chunk(2, -1)
        c, s = angles.double().cos()[:, None], angles.double().sin()[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    assert_near(query, turned(given[:, :heads], norms[0]), DTYPES[dtype])
    stored = [token for token, slot in enumerate(slots) if slot >= 0]
    places = [slot for slot in slots if slot >= 0]
    assert_near(keys.flatten(0, 1)[places], turned(given[:, heads:-kv_heads], norms[1])[stored], DTYPES[dtype])
    assert torch.equal(values.flatten(0, 1)[places], given[stored, -kv_heads:])
    others = [slot for slot in range(40) if slot not in places]
    for now, then in zip((keys, values), before, strict=True):
        assert torch.equal(now.flatten(0, 1)[others], then.flatten(0, 1)[others])
