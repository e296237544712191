"""The attention kernels against the float64 oracle: on a GPU in every dtype, elsewhere in Triton's interpreter."""

from random import Random
from typing import Any

import pytest
import torch

from chatpage.kernels import decode
from chatpage.model.batch import Batch, Row
from chatpage.model.kv import KVPool
from chatpage.model.paged import PagedAttention
from tests.kernels.case import Case, Form, Sketch, draw_rows, poisoned, same_bits
from tests.kernels.conftest import DEVICE, ON_GPU, needs_gpu

FULL = torch.float32
# The interpreter's products of bfloat16 matrices are wrong.
DTYPES = [FULL, torch.float16, torch.bfloat16] if ON_GPU else [FULL]
HALVES = DTYPES[1:] or [torch.float16]
SHARED = [True, False, None]
LONGEST = 3000 if ON_GPU else 70
CHUNK = 300 if ON_GPU else 20

# Each size, ratio of heads, block size and option at least once, in mixtures in which real models have them and others.
FORMS = {
    "plain": Form(),
    "one head": Form(1, 1),
    "no groups": Form(4, 4, 80, 80, softcap=50.0),
    "groups of 4": Form(8, 2, 128, 128, window=40, sinks=True),
    "one key for all": Form(16, 1, 96, 96, block_size=32),
    "groups of 2 on 3": Form(6, 3, 64, 96, block_size=8, window=19),
    "values are smaller": Form(8, 2, 96, 64, softcap=5.0, sinks=True),
    "values are larger": Form(2, 2, 64, 128, block_size=32, window=33, softcap=8.0),
    "widest": Form(2, 1, 256, 256, block_size=8, window=16),
    "unequal and wide": Form(4, 2, 256, 128, sinks=True, scaling=0.05),
    "large blocks": Form(4, 2, block_size=64, window=65, sinks=True),
    "odd blocks": Form(4, 2, block_size=12, window=24),
    "small sizes": Form(4, 2, 32, 24, block_size=8, scaling=0.5),
    "window of one": Form(window=1),
    "window of one with sinks": Form(window=1, sinks=True, softcap=3.0),
    "window beyond all": Form(window=10**6, sinks=True),
    "sharp": Form(scaling=2.0),
    "flat": Form(scaling=1e-4, sinks=True),
}


def paged(shared: bool | None) -> Any:
    return lambda pool, batch: PagedAttention(pool, batch, shared=shared)


@pytest.mark.parametrize("shared", SHARED if ON_GPU else [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_rows_of_every_sort(form, dtype, shared):
    for seed in range(3 if ON_GPU else 1):
        random = Random(f"{form} {seed}")
        rows = draw_rows(random, form.block_size, rows=24 if ON_GPU else 6, longest=LONGEST, chunk=CHUNK)
        Case.make(form, rows, seed=seed, device=DEVICE, dtype=dtype).check(paged(shared))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_half_precision(dtype, shared):
    form = Form(8, 2, 64, 64, window=30, softcap=10.0, sinks=True)
    rows = draw_rows(Random(5), form.block_size, rows=5, longest=LONGEST, chunk=CHUNK)
    Case.make(form, rows, device=DEVICE, dtype=dtype).check(paged(shared))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 70])
def test_a_row_alone(length, shared):
    """As a decode, as a whole prompt, and as a token that runs again, on and beside a block's edge."""
    for tokens, store in [(1, True), (length, True), (1, False)]:
        sketch = Sketch(16)
        sketch.add(tokens, length - tokens, store=store)
        Case.make(Form(2, 1), sketch.rows, seed=length, device=DEVICE).check(paged(shared))


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("window", [None, 5, 16, 37, 48])
def test_decodes_behind_prefixes_of_prefixes(window, shared):
    """Two groups; in one, members share more with each other than with all. The window ends in own or shared ones."""
    form = Form(4, 2, block_size=8, window=window, sinks=window == 37)
    sketch = Sketch(8)
    stem = sketch.blocks(4)
    branch, other = stem + sketch.blocks(2), sketch.blocks(1)
    for trunk, start in [(stem, 32), (stem, 45), (branch, 48), (branch, 61), (stem[:1], 8), (other, 8), (other, 30)]:
        sketch.add(1, start, trunk)
    sketch.add(1, 20)
    Case.make(form, sketch.rows, seed=window or 0, device=DEVICE).check(paged(shared))


@pytest.mark.parametrize(
    ("window", "shared"),
    [(None, True), (None, False), (None, None), (64, True), (150, True), (150, False), (300, False)],
)
def test_contexts_that_several_programs_share(window, shared):
    """Long enough to be split, on the edges of the parts and beside them."""
    form = Form(4, 1, 64, 32, window=window, sinks=window == 150, softcap=5.0 if window == 300 else None)
    sketch = Sketch(16)
    trunk = sketch.blocks(26)
    for tokens, start in [(1, 416), (1, 417), (1, 500), (1, 620), (20, 450)]:
        sketch.add(tokens, start, trunk)
    for context in (64, 127, 128, 129, 256, 257, 385):
        sketch.add(1, context - 1)
    sketch.add(70, 130)
    Case.make(form, sketch.rows, seed=window or 0, device=DEVICE).check(paged(shared))


@pytest.mark.parametrize("window", [None, 33, 64])
def test_chunks_that_begin_and_end_on_edges(window):
    sketch = Sketch(16)
    for start in (14, 15, 16, 31, 32, 33, 61, 62, 63, 64, 65, 126, 127, 128, 191):
        sketch.add(2 + start % 2, start)
    for context in (31, 32, 33, 63, 64, 65, 129):
        sketch.add(context, 0)
    Case.make(Form(1, 1, 64, 32, window=window), sketch.rows, device=DEVICE).check(paged(None))


@pytest.mark.parametrize("shared", [True, False])
def test_a_few_very_long_contexts(shared):
    """One alone in the step, of each length, as it may be split into more parts the longer it is, then three."""
    lengths = [300, 600, 900, 1200, 2600, 9000, 20_000] if ON_GPU else [300, 600, 900, 1200, 4500]
    for length in lengths:
        sketch = Sketch(16)
        sketch.add(1, length)
        Case.make(Form(1, 1, 32, 32), sketch.rows, device=DEVICE).check(paged(shared))
    length = lengths[-1] // 2
    sketch = Sketch(16)
    trunk = sketch.blocks(length // 16)
    for start in (length, length + 5):
        sketch.add(1, start, trunk)
    sketch.add(1, length)
    Case.make(Form(2, 1, 32, 32), sketch.rows, device=DEVICE).check(paged(shared))


@pytest.mark.parametrize("crowd", [1, 10**6])
@pytest.mark.parametrize("shared", SHARED)
def test_many_decodes_behind_one_prefix(shared, crowd, monkeypatch):
    """More queries than fit one tile, of rows whose own parts differ much in length; shared ones first, or own ones."""
    monkeypatch.setattr(decode, "CROWD", crowd)
    form = Form(8, 1)
    sketch = Sketch(16)
    trunk = sketch.blocks(64 if ON_GPU else 9)
    random = Random(2)
    for _ in range(300 if ON_GPU else 20):
        sketch.add(1, len(trunk) * 16 + random.choice([0, 1, 7, 15, 16, random.randint(0, LONGEST // 2)]), trunk)
    Case.make(form, sketch.rows, device=DEVICE).check(paged(shared))


@pytest.mark.parametrize("shared", [True, False])
def test_the_same_table_at_different_lengths(shared):
    """Tokens that run again see only what is before them of blocks that others see more of."""
    form = Form(4, 2, block_size=8)
    sketch = Sketch(8)
    trunk = sketch.blocks(5)
    for tokens, start in [(1, 39), (1, 38), (1, 39), (1, 0), (1, 7), (1, 8), (5, 12), (9, 31)]:
        sketch.add(tokens, start, trunk, store=False)
    sketch.add(1, 40, trunk)
    sketch.add(11, 44, trunk)
    Case.make(form, sketch.rows, device=DEVICE).check(paged(shared))


@pytest.mark.filterwarnings("ignore:invalid value")  # the rows of the null block read NaN
@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_the_null_block_disturb_nobody(shared):
    """So a step is filled up to a size: tokens that are stored nowhere, and see one slot of the null block."""
    sketch = Sketch(16)
    trunk = sketch.blocks(2)
    for start in (32, 33, 50):
        sketch.add(1, start, trunk)
    sketch.rows += [Row([0], 0, [0], store=False) for _ in range(5)]
    sketch.add(9, 3)
    Case.make(Form(), sketch.rows, device=DEVICE).check(paged(shared))


@pytest.mark.parametrize("rising", [1, -1])
def test_scores_that_grow_and_fall_along_the_context(rising):
    """What was summed up before must be forgotten where a score is larger by far, and kept where it is smaller."""
    length = 400 if ON_GPU else 60
    slope = rising * 120 / length
    sketch = Sketch(8)
    trunk = sketch.blocks(3)
    for start in (24, 31, length):
        sketch.add(1, start, trunk)
    sketch.add(6, length)
    form = Form(2, 2, block_size=8, scaling=1.0)
    for shared in (True, False):
        case = Case.make(form, sketch.rows, device=DEVICE)
        case.query.zero_()
        case.query[..., 0] = 1.0
        keys = case.pool.keys[0]
        for row in case.batch.rows:
            for position in range(row.start):
                keys[row.table[position // 8], position % 8, :, 0] = slope * position
        case.key[..., 0] = slope * case.batch.positions[:, None]
        case.check(paged(shared))


@pytest.mark.parametrize("sink", [-80.0, 0.0, 80.0])
def test_sinks_that_take_nothing_or_nearly_all(sink):
    sketch = Sketch(16)
    trunk = sketch.blocks(1)
    for tokens, start in [(1, 16), (1, 40), (1, 0), (7, 20)]:
        sketch.add(tokens, start, trunk if start >= 16 else ())
    for shared in (True, False):
        case = Case.make(Form(4, 2, sinks=True), sketch.rows, device=DEVICE)
        case.settings["sinks"].fill_(sink)
        case.check(paged(shared))


@pytest.mark.parametrize("shared", [True, False])
def test_the_order_of_the_rows_changes_no_answer(shared):
    form = FORMS["groups of 2 on 3"]
    rows = draw_rows(Random(8), form.block_size, rows=6, longest=LONGEST, chunk=CHUNK)
    case = Case.make(form, rows, device=DEVICE)
    out = case.check(paged(shared))
    turned = Batch.build(rows[::-1], block_size=form.block_size, device=DEVICE)
    answers = dict(zip(case.batch.order, _rows_of(out, case.batch), strict=True))
    moved = {tensor: _rows_of(getattr(case, tensor), case.batch) for tensor in ("query", "key", "value")}
    where = {i: place for place, i in enumerate(case.batch.order)}
    again = PagedAttention(case.pool, turned, shared=shared).attend(
        0,
        *(torch.cat([moved[name][where[len(rows) - 1 - i]] for i in turned.order]) for name in moved),
        case.call,
    )
    for i, answer in zip(turned.order, _rows_of(again, turned), strict=True):
        torch.testing.assert_close(answer, answers[len(rows) - 1 - i], rtol=1e-4, atol=1e-5)


def _rows_of(tensor: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    return list(tensor.split(batch.query_starts.diff().tolist()))


@pytest.mark.parametrize("shared", [True, False])
def test_reading_changes_nothing_and_storing_is_the_other_half(shared):
    form = Form(4, 2, block_size=8, sinks=True)
    rows = draw_rows(Random(9), 8, rows=5, longest=40, chunk=9)
    sketch = Sketch(8)
    sketch.blocks(max(block for row in rows for block in row.table))
    trunk = sketch.blocks(40)
    for start in (320, 333, 600):
        sketch.add(1, start, trunk)
    case = Case.make(form, rows + sketch.rows, device=DEVICE)
    expected = case.expected()
    attention = PagedAttention(case.pool, case.batch, shared=shared)
    attention.store(0, case.key, case.value)
    pool = [memory[0].clone() for memory in (case.pool.keys, case.pool.values)]
    with poisoned():
        first = attention.read(0, case.query, case.call)
        case.compare(first, expected)
        for _ in range(2):
            assert torch.equal(attention.read(0, case.query, case.call), first), "each time the same"
    assert same_bits(pool[0], case.pool.keys[0])
    assert same_bits(pool[1], case.pool.values[0])


@pytest.mark.parametrize("shared", [True, False])
def test_layers_of_different_shapes_and_windows_in_one_step(shared):
    """One object serves all layers, in turn; what it keeps of one layer must not serve another."""
    forms = [
        Form(4, 2, 64, 64),
        Form(4, 2, 64, 64, window=9, sinks=True),
        Form(8, 1, 80, 32, window=30),
        Form(4, 4, 128, 128, softcap=4.0),
        Form(4, 1, 64, 64),
        Form(4, 2, 64, 64),
    ]
    rows = draw_rows(Random(11), 16, rows=5, longest=60, chunk=9)
    sketch = Sketch(16)
    sketch.blocks(max(block for row in rows for block in row.table))
    sketch.add(70, 5)
    rows += sketch.rows
    tables = [list(row.table) for row in rows]
    cases = []
    for form in forms:
        for row, table in zip(rows, tables, strict=True):
            row.table = list(table)
        cases.append(Case.make(form, rows, seed=1, device=DEVICE))
    batch = cases[0].batch
    assert all(torch.equal(case.batch.tables, batch.tables) for case in cases)
    pool = KVPool(tuple(form.layer for form in forms), cases[0].pool.num_blocks, 16, DEVICE, FULL)
    pool.keys, pool.values = [case.pool.keys[0] for case in cases], [case.pool.values[0] for case in cases]
    expected = [case.expected() for case in cases]
    attention = PagedAttention(pool, batch, shared=shared)
    with poisoned():
        for layer, case in enumerate(cases):
            out = attention.attend(layer, case.query, case.key, case.value, case.call)
            case.compare(out, expected[layer])


@needs_gpu
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_contexts_and_many_rows(dtype, shared):
    form = Form(32, 8, 128, 128)
    sketch = Sketch(16)
    trunk = sketch.blocks(200)
    for i in range(128):
        sketch.add(1, 3200 + 17 * i, trunk)
    for i in range(16):
        sketch.add(1, 500 * i)
    sketch.add(1500, 3200, trunk)
    sketch.add(700, 5)
    Case.make(form, sketch.rows, device=DEVICE, dtype=dtype).check(paged(shared))


@needs_gpu
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_beyond_two_to_the_32_numbers(shared):
    """The tables are drawn from a pool of which more than half lies beyond 2^31 numbers, and a part beyond 2^32."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("a pool of more than 2^32 numbers takes 60 GiB of GPU memory, which are not free")
    form = Form(8, 8, 128, 128)
    numbers = form.block_size * form.kv_heads * form.key_size
    rows = draw_rows(Random(3), form.block_size, rows=16, longest=LONGEST, chunk=CHUNK)
    case = Case.make(form, rows, device=DEVICE, dtype=torch.bfloat16, blocks=300_000)
    used = {block for row in rows for block in row.table}
    assert any(2**31 < block * numbers < 2**32 for block in used)
    assert any(block * numbers > 2**32 for block in used)
    case.check(paged(shared))


@needs_gpu
@pytest.mark.parametrize("crowd", [1, 10**6])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("window", [None, 500])
def test_a_captured_step_answers_what_it_answered_before(window, shared, crowd, monkeypatch):
    """With what is shared and what is own on two streams, in either order."""
    monkeypatch.setattr(decode, "CROWD", crowd)
    form = Form(8, 2, 128, 128, window=window, sinks=True)
    sketch = Sketch(16)
    trunk = sketch.blocks(100)
    for i in range(40):
        sketch.add(1, 1600 + 7 * i, trunk)
    sketch.add(CHUNK, 1600, trunk)
    case = Case.make(form, sketch.rows, device=DEVICE, dtype=torch.bfloat16)
    attention = PagedAttention(case.pool, case.batch, shared=shared)

    def step() -> torch.Tensor:
        return attention.attend(0, case.query, case.key, case.value, case.call)

    step()
    [plan] = attention.plans.values()
    assert (len(plan.shared) > 0) == (shared and window is None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        for tensor in (case.query, case.key, case.value):
            tensor.copy_(torch.randn_like(tensor))
        expected, eager = case.expected(), step().clone()
        out.fill_(torch.nan)
        graph.replay()
        case.compare(out, expected)
        assert torch.equal(out, eager)
