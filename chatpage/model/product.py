"""Some linear layers side by side as one product, and on some CPUs with the weights as oneDNN multiplies fastest with.

q_proj ┐
k_proj ├─ joined: each of them is a part of it ── packed: opaque, and the only one there is
v_proj ┘
"""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]

FEW = (1, 8)  # rows of the steps that somebody waits for
TRIED = 64 * 2**20  # bytes of weights: more than what a core's own cache holds
TIMES = 7
CLEARLY = 0.9


class Product:
    """Linear layers of one input: (rows, inputs) to (rows, all their outputs).

    At first they keep their weights, which are parts of the joined ones then; `pack` takes them away.

    Raises:
        ValueError: they are not plain linear layers, or only some of them have a bias.
    """

    @torch.no_grad()
    def __init__(self, linears: list[Any]) -> None:
        if any(type(linear) is not nn.Linear for linear in linears):
            raise ValueError("Some of its products are not plain linear layers.")
        biases = [linear.bias for linear in linears]
        if any((bias is None) != (biases[0] is None) for bias in biases):
            raise ValueError("Only some of its products have a bias.")
        self._linears = linears
        self._weight = _joined([linear.weight for linear in linears])
        self._bias = None if biases[0] is None else _joined(biases)
        self._is_packed = False

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply; into `out`, if given, where nothing is packed.

        Raises:
            ValueError: `out` has another shape than the product.
        """
        if not self._is_packed:
            return self._multiply_into(hidden, out) if out is not None else F.linear(hidden, self._weight, self._bias)
        rows = len(hidden)
        if missing := _filled(rows) - rows:
            return _multiply(F.pad(hidden, (0, 0, 0, missing)), self._weight, self._bias)[:rows]
        return _multiply(hidden, self._weight, self._bias)

    def _multiply_into(self, hidden: Tensor, out: Tensor) -> Tensor:
        if out.shape != (len(hidden), len(self._weight)):  # torch would give it another one
            raise ValueError(f"The product is {len(hidden)} × {len(self._weight)}, but {tuple(out.shape)} is wanted.")
        if self._bias is None:
            return torch.mm(hidden, self._weight.t(), out=out)
        return torch.addmm(self._bias, hidden, self._weight.t(), out=out)

    @torch.no_grad()
    def pack(self, *, keep: Tensor) -> None:
        """Rearrange the weights for oneDNN, where that can be. The layers have no weights then, save for `keep`.

        Harmless the second time.
        """
        packed = None if self._is_packed else _rearranged(self._weight)
        if packed is None:
            return
        self._weight, self._is_packed = packed, True
        for linear in self._linears:
            if linear.weight is not keep:
                linear.weight.data = linear.weight.new_empty(0)


@torch.inference_mode()
def packing_pays(products: Sequence[Product]) -> bool:
    """Whether few rows are clearly multiplied faster with packed weights, by trying with the first of these products.

    It depends on the processor. With plain weights MKL does it: on an Intel Xeon in two thirds of the time, for one
    row; but on an AMD EPYC it rearranges them in each call, which is most of the work then.
    """
    sizes = accumulate(product._weight.nbytes for product in products)
    few = sum(size <= TRIED for size in sizes)
    plain = [product._weight for product in products[: max(1, few)]]
    packed = [laid for weight in plain if (laid := _rearranged(weight)) is not None]
    if len(packed) < len(plain):
        return False
    with_it = without = 0.0
    for rows in FEW:
        hidden = [weight.new_ones(rows, weight.shape[1]) for weight in plain]
        turns = [(_seconds(_multiply, hidden, packed), _seconds(F.linear, hidden, plain)) for _ in range(TIMES)]
        with_it += min(first for first, _ in turns)
        without += min(second for _, second in turns)
    log.info("Products of few rows take %.6f s with packed weights, %.6f s without", with_it, without)
    return with_it < CLEARLY * without


def _seconds(multiply: Multiply, inputs: list[Tensor], weights: list[Tensor]) -> float:
    begun = time.perf_counter()
    for hidden, weight in zip(inputs, weights, strict=True):
        multiply(hidden, weight, None)
    return time.perf_counter() - begun


# These are no public functions of torch, but those that its compiler calls; `tests/model/test_product.py` tries them.


def _multiply(hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")


def _rearranged(weight: Tensor) -> Tensor | None:
    """The weights as oneDNN wants them; None where there is no oneDNN, or it does not help."""
    if not (weight.is_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        found = _multiply(weight[:1], packed, None)
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("oneDNN multiplies in another way here: %r", error)
        return None
    expected = F.linear(weight[:1], weight)
    return packed if torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()) else None


def _filled(rows: int) -> int:
    """With how many rows to multiply: oneDNN compiles a program for each number of them, and keeps half a MiB each."""
    unit = 1 if rows <= 8 else 8 if rows <= 64 else 64
    return -(-rows // unit) * unit


def _joined(weights: list[nn.Parameter]) -> Tensor:
    """All of them in one tensor, of which each is a part from now on: no weight is kept twice."""
    if len(weights) == 1:
        return weights[0].data
    joined = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return joined
