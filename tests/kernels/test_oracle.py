"""Whether the kernels' tests can be trusted: the oracle is right, and attention that is wrong does not pass."""

from collections.abc import Callable
from dataclasses import fields
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chatpage.model.attention import AttentionCall
from chatpage.model.batch import Batch, Row
from chatpage.model.kv import KVPool
from chatpage.model.reference import ReferenceAttention
from tests.kernels import oracle
from tests.kernels.case import Case, Form, Sketch, draw_rows
from tests.kernels.test_attention import FORMS

Change = Callable[[ReferenceAttention, dict[str, Any]], Any]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_the_torch_attention_passes(form):
    for seed in range(3):
        rows = draw_rows(Random(seed), form.block_size, rows=12, longest=150, chunk=40)
        Case.make(form, rows, seed=seed).check(ReferenceAttention)


def test_the_oracle_gives_what_attention_to_a_whole_prompt_gives():
    sketch = Sketch(16)
    sketch.add(50, 0)
    case = Case.make(Form(4, 4, scaling=0.125), sketch.rows)
    query, key, value = (tensor.double().transpose(0, 1) for tensor in (case.query, case.key, case.value))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1)
    torch.testing.assert_close(case.expected(), expected)


def test_the_oracle_by_hand():
    """Two keys in two blocks: scores 1 and 2, a window that sees both or the last, a sink with the score 3."""
    keys, values = torch.full((4, 1, 1, 1), torch.nan), torch.full((4, 1, 1, 1), torch.nan)
    keys[3], values[3] = 1.0, 10.0
    batch = Batch.build([Row([7], 1, [3, 1])], block_size=1)
    query, key, value = torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 20.0)

    def answer(**settings: Any) -> float:
        settings = {"scaling": 1.0, "window": None, "softcap": None, "sinks": None} | settings
        return float(oracle.attention(keys, values, batch, query, key, value, **settings))

    e = torch.e
    assert answer() == pytest.approx((10 + 20 * e) / (1 + e))
    assert answer(window=2) == answer()
    assert answer(window=1) == 20.0
    assert answer(scaling=0.0) == 15.0
    assert answer(sinks=torch.tensor([3.0])) == pytest.approx((10 + 20 * e) / (1 + e + e * e))
    assert answer(softcap=1e-9) == pytest.approx(15.0)


class Faulty:
    """The torch attention with a fault: `before` spoils the settings or what is given, `after` the answer."""

    def __init__(self, pool: KVPool, batch: Batch) -> None:
        self.pool, self.batch = pool, batch

    def before(self, given: dict[str, Any]) -> None: ...

    def after(self, out: Tensor) -> None: ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        given = {field.name: getattr(call, field.name) for field in fields(call)}
        given |= {"query": query, "key": key, "value": value}
        self.before(given)
        tensors = [given.pop(name) for name in ("query", "key", "value")]
        out = ReferenceAttention(self.pool, self.batch).attend(layer, *tensors, AttentionCall(**given))
        self.after(out)
        return out


class WindowLargerByOne(Faulty):
    def before(self, given: dict[str, Any]) -> None:
        given["window"] += 1


class WindowSmallerByOne(Faulty):
    def before(self, given: dict[str, Any]) -> None:
        given["window"] -= 1


class ScaleSlightlyOff(Faulty):
    def before(self, given: dict[str, Any]) -> None:
        given["scaling"] *= 1.001


class UsualScale(Faulty):
    def before(self, given: dict[str, Any]) -> None:
        given["scaling"] = given["query"].shape[-1] ** -0.5


class NoSinks(Faulty):
    def before(self, given: dict[str, Any]) -> None:
        given["sinks"] = None


class SinksOfOtherHeads(Faulty):
    def before(self, given: dict[str, Any]) -> None:
        given["sinks"] = given["sinks"].roll(1)


class SoftcapMissed(Faulty):
    def before(self, given: dict[str, Any]) -> None:
        given["softcap"] = None


class HeadsInterleaved(Faulty):
    """Query heads of one key are taken to lie apart instead of side by side."""

    def before(self, given: dict[str, Any]) -> None:
        given["query"] = given["query"].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


class CoarseProducts(Faulty):
    """As with TF32: ten bits of mantissa enter the products."""

    def before(self, given: dict[str, Any]) -> None:
        given["query"] = given["query"].half().float()


class LastTokenOfARowMissed(Faulty):
    def __init__(self, pool: KVPool, batch: Batch) -> None:
        for row in batch.rows:
            if len(row.tokens) == 1 and row.start > 0:
                row.start -= 1
        super().__init__(pool, Batch.build(batch.rows, block_size=batch.block_size))


class SeesOneTokenMore(Faulty):
    """One slot past the end: NaN, or in a shared block a token that belongs to others."""

    def __init__(self, pool: KVPool, batch: Batch) -> None:
        rows = [
            Row(row.tokens, row.start + 1, [*row.table, 0], row.store) if len(row.tokens) == 1 else row
            for row in batch.rows
        ]
        super().__init__(pool, batch)
        self.seen = Batch.build(rows, block_size=batch.block_size)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        self.pool.store(layer, self.batch.slots, key, value)
        self.seen.slots.fill_(-1)
        return ReferenceAttention(self.pool, self.seen).attend(layer, query, key, value, call)


class OneAnswerIsNoNumber(Faulty):
    def after(self, out: Tensor) -> None:
        out[-1, -1, -1] = torch.nan


class OneAnswerIsNotWritten(Faulty):
    def after(self, out: Tensor) -> None:
        out[0] = torch.empty_like(out[0])


class StoresWhatHasNoSlot(Faulty):
    """Slot −1 is the pool's last one where an index may count from the end."""

    def after(self, out: Tensor) -> None:
        self.pool.flat(self.pool.keys[0])[-1] = 1.0


class ChangesOneBit(Faulty):
    def after(self, out: Tensor) -> None:
        table = self.batch.rows[-1].table
        self.pool.values[0].view(torch.int32)[table[0], 0, 0, 0] ^= 1


class ForgetsToStoreOneToken(Faulty):
    def before(self, given: dict[str, Any]) -> None:
        given["window"] = 10**6
        self.kept = self.pool.values[0].clone(), int(self.batch.slots.max())

    def after(self, out: Tensor) -> None:
        before, slot = self.kept
        self.pool.flat(self.pool.values[0])[slot] = self.pool.flat(before)[slot]


ALL = Form(8, 4, window=23, softcap=3.0, sinks=True)
SHARP = Form(4, 2, block_size=8)


@pytest.mark.parametrize(
    ("fault", "form"),
    [
        (WindowLargerByOne, ALL),
        (WindowSmallerByOne, ALL),
        (ScaleSlightlyOff, ALL),
        (UsualScale, ALL),
        (NoSinks, ALL),
        (SinksOfOtherHeads, ALL),
        (SoftcapMissed, ALL),
        (HeadsInterleaved, ALL),
        (CoarseProducts, SHARP),
        (LastTokenOfARowMissed, SHARP),
        (SeesOneTokenMore, SHARP),
        (OneAnswerIsNoNumber, SHARP),
        (OneAnswerIsNotWritten, SHARP),
        (StoresWhatHasNoSlot, SHARP),
        (ChangesOneBit, SHARP),
        (ForgetsToStoreOneToken, FORMS["window beyond all"]),
    ],
)
def test_a_fault_is_found(fault, form):
    """By the rows of one seed alone."""
    rows = draw_rows(Random(6), form.block_size, rows=6, longest=70, chunk=20)
    assert any(not row.store for row in rows)
    case = Case.make(form, rows, seed=6)
    with pytest.raises(AssertionError):
        case.check(fault)


def test_rows_of_every_sort_are_drawn():
    rows = [row for seed in range(20) for row in draw_rows(Random(seed), 8, rows=6, longest=70, chunk=20)]
    assert any(row.context == 1 for row in rows)
    assert any(len(row.tokens) == 1 and row.start for row in rows)
    assert any(len(row.tokens) > 1 and row.store and row.start == 0 for row in rows)
    assert any(len(row.tokens) > 1 and row.store and row.start for row in rows)
    assert any(len(row.tokens) > 1 and not row.store for row in rows)
    assert any(len(row.table) * 8 - row.context >= 8 for row in rows)
    deepest = 0
    for seed in range(20):
        origins: dict[int, list[Row]] = {}
        for row in draw_rows(Random(seed), 8, rows=6, longest=70, chunk=20):
            origins.setdefault(row.table[0], []).append(row)
        groups = [{tuple(row.table[:2]) for row in group} for group in origins.values() if len(group) > 2]
        deepest = max([deepest, *map(len, groups)])
    assert deepest > 1, "some that begin with the same block go on with different ones"
