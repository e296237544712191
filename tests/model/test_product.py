"""Linear layers side by side as one product: the same numbers, packed or not, and weights in one place."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatpage.model import product
from chatpage.model.product import Product, packing_pays

HAS_ONEDNN = torch.backends.mkldnn.is_available()


def layers(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(48, outputs, bias=bias, dtype=dtype) for outputs in (96, 32, 32)]


def packed(linears: list[nn.Linear]) -> Product:
    made = Product(linears)
    made.pack(keep=torch.empty(0))
    return made


def is_packed(linears: list[nn.Linear]) -> bool:
    return not any(linear.weight.numel() for linear in linears)


@torch.inference_mode()
def answers(linears: list[nn.Linear], hidden: Tensor) -> Tensor:
    return torch.cat([linear(hidden) for linear in linears], dim=-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 37, 64, 65, 200])
def test_packed_weights_give_the_same(rows: int, bias: bool) -> None:
    linears, hidden = layers(bias=bias), torch.randn(rows, 48)
    expected = answers(linears, hidden)
    joined = Product(linears)
    with torch.inference_mode():
        torch.testing.assert_close(joined(hidden), expected)
        joined.pack(keep=torch.empty(0))
        torch.testing.assert_close(joined(hidden), expected)
    assert is_packed(linears) == HAS_ONEDNN


def test_joined_weights_are_parts_of_one() -> None:
    linears = layers()
    Product(linears)
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    assert linears[0].weight.untyped_storage().nbytes() == sum(linear.weight.nbytes for linear in linears)


def test_a_weight_that_others_need_is_kept() -> None:
    linears = layers()[:1]
    weight = linears[0].weight
    Product(linears).pack(keep=weight)
    assert weight.shape == (96, 48)


@torch.inference_mode()
def test_packing_twice_is_harmless() -> None:
    linears, hidden = layers(), torch.randn(2, 48)
    expected = answers(linears, hidden)
    twice = packed(linears)
    twice.pack(keep=torch.empty(0))
    torch.testing.assert_close(twice(hidden), expected)


@torch.inference_mode()
def test_other_numbers_are_multiplied_as_usual() -> None:
    linears, hidden = layers(dtype=torch.float64), torch.randn(2, 48, dtype=torch.float64)
    torch.testing.assert_close(packed(linears)(hidden), answers(linears, hidden))
    assert not is_packed(linears)


def missing(*_args: object) -> Tensor:
    raise AttributeError("no such function")


def changed(*_args: object) -> Tensor:
    raise TypeError("other arguments")


@pytest.mark.parametrize("error", [missing, changed])
@torch.inference_mode()
def test_a_torch_that_packs_otherwise_multiplies_as_usual(error, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_multiply", error)
    linears, hidden = layers(), torch.randn(2, 48)
    torch.testing.assert_close(packed(linears)(hidden), answers(linears, hidden))
    assert not is_packed(linears)


def slow(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def multiplied(*args: object) -> Tensor:
        time.sleep(0.001)
        return multiply(*args)

    return multiplied


@pytest.mark.parametrize("biggest", [0, 10**9], ids=["each is larger than what is tried", "all are tried"])
def test_weights_are_packed_where_that_is_faster(biggest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them is tried, however large it is. A torch that has no oneDNN never packs."""
    monkeypatch.setattr(product, "TRIED", biggest)
    products = [Product(layers()), Product(layers())]
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", slow(F.linear))
        assert packing_pays(products) == HAS_ONEDNN
    with monkeypatch.context() as patch:
        patch.setattr(product, "_multiply", slow(product._multiply))
        assert not packing_pays(products)


def test_trying_leaves_the_weights_as_they_are() -> None:
    linears = layers()
    before = [linear.weight.clone() for linear in linears]
    packing_pays([Product(linears)])
    for linear, weight in zip(linears, before, strict=True):
        assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize("error", [missing, changed])
def test_what_cannot_be_packed_does_not_pay(error: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not packing_pays([Product(layers(dtype=torch.float64))])
    monkeypatch.setattr(product, "_multiply", error)
    assert not packing_pays([Product(layers())])


def test_few_numbers_of_rows_are_compiled() -> None:
    """And not many rows are multiplied for nothing."""
    filled = [product._filled(rows) for rows in range(1, 1025)]
    assert len(set(filled)) == 30
    assert all(rows <= more < 2 * rows for rows, more in enumerate(filled, 1))


@pytest.mark.parametrize("wrong", [[nn.Linear(4, 4), nn.Linear(4, 4, bias=False)], [nn.Identity()]])
def test_what_is_not_plain_is_refused(wrong: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match="products"):
        Product(wrong)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_goes_where_it_is_wanted(bias: bool) -> None:
    linears, hidden = layers(bias=bias), torch.randn(5, 48)
    with torch.inference_mode():
        expected, wanted = answers(linears, hidden), torch.full((5, 160), float("nan"))
        assert Product(linears)(hidden, wanted) is wanted
    torch.testing.assert_close(wanted, expected)


def test_a_place_of_another_shape_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"5 × 160.*\(5, 161\)"):
        Product(layers())(torch.randn(5, 48), torch.empty(5, 161))


def test_what_is_packed_answers_too_if_it_is_told_where() -> None:
    linears, hidden = layers(), torch.randn(5, 48)
    with torch.inference_mode():
        expected = answers(linears, hidden)
        found = packed(linears)(hidden, torch.empty(5, 160))
    torch.testing.assert_close(found, expected)
