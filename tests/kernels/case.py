"""A step to try attention on: rows of every sort over a pool of shuffled blocks, where all that no row owns is NaN."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any

import torch
from torch import Tensor

from chatpage.model.attention import Attention, AttentionCall
from chatpage.model.batch import Batch, Row
from chatpage.model.kv import KVPool, LayerShape
from tests.kernels import oracle

# Norm of the error over the norm of the answer, for each row by itself.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Form:
    """What does not depend on the rows."""

    heads: int = 4
    kv_heads: int = 2
    key_size: int = 64
    value_size: int = 64
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scaling: float = 0.15

    @property
    def layer(self) -> LayerShape:
        return LayerShape(self.kv_heads, self.key_size, self.value_size)


class Sketch:
    """Rows in the making. Blocks are counted up from 1; a case shuffles them."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.rows: list[Row] = []
        self._next = count(1)

    def blocks(self, number: int) -> list[int]:
        return [next(self._next) for _ in range(number)]

    def add(self, tokens: int, start: int, trunk: Sequence[int] = (), *, store: bool = True, spare: int = 0) -> None:
        """A row whose table begins with `trunk`, and ends with so many blocks more than it needs."""
        assert not store or start >= len(trunk) * self.block_size, "only a row's own blocks are written"
        needed = -(-(start + tokens) // self.block_size)
        table = [*trunk, *self.blocks(max(0, needed - len(trunk)) + spare)]
        self.rows.append(Row([0] * tokens, start, table, store=store))


def draw_rows(random: Random, block_size: int, *, rows: int, longest: int, chunk: int) -> list[Row]:
    """Decodes, chunks of up to so many tokens, and tokens that run again, behind prefixes that have parts in common."""
    sketch = Sketch(block_size)
    some = max(1, longest // (3 * block_size))
    stem = sketch.blocks(random.randint(1, some))
    other = sketch.blocks(random.randint(1, some))
    trunks = [
        [],
        stem,
        stem + sketch.blocks(random.randint(1, some)),
        stem[: random.randint(1, len(stem))] + sketch.blocks(1),
        other,
    ]
    sketch.add(1, 0)
    for _ in range(rows - 1):
        trunk = random.choice(trunks)
        shared = len(trunk) * block_size
        start = random.choice([shared, random.randint(shared, max(longest, shared + block_size))])
        spare = random.choice([0, 0, 2])
        kind = random.choice(["decode", "decode", "chunk", "again"])
        if kind == "decode":
            sketch.add(1, start, trunk, spare=spare)
        elif kind == "chunk":
            sketch.add(random.randint(2, chunk), start, trunk, spare=spare)
        else:  # possibly long before the prefix ends
            tokens = random.choice([1, 1, random.randint(1, chunk)])
            sketch.add(tokens, random.randint(0, shared + block_size), trunk, store=False, spare=spare)
    random.shuffle(sketch.rows)
    return sketch.rows


@dataclass(slots=True)
class Case:
    """One step of a model of one layer."""

    form: Form
    pool: KVPool
    batch: Batch
    query: Tensor
    key: Tensor
    value: Tensor
    settings: dict[str, Any]

    @classmethod
    def make(
        cls,
        form: Form,
        rows: list[Row],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        blocks: int | None = None,
    ) -> "Case":
        """Random numbers for these rows in a pool of at least so many blocks; their tables are shuffled in place."""
        random = Random(seed)
        used = sorted({block for row in rows for block in row.table if block})
        blocks = max(len(used) + 5, blocks or 0)
        shuffled = dict(zip(used, random.sample(range(1, blocks + 1), len(used)), strict=True))
        for row in rows:
            row.table = [shuffled.get(block, 0) for block in row.table]
        batch = Batch.build(rows, block_size=form.block_size, device=device)
        pool = KVPool((form.layer,), blocks, form.block_size, device, dtype)
        numbers = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=numbers, device=device, dtype=dtype)

        written = _written(rows, form.block_size, device)
        for memory in (pool.keys[0], pool.values[0]):
            memory.fill_(torch.nan)
            flat = pool.flat(memory)
            flat[written] = draw(len(written), *flat.shape[1:])
        tokens = len(batch.token_ids)
        sizes = [(form.heads, form.key_size), (form.kv_heads, form.key_size), (form.kv_heads, form.value_size)]
        query, key, value = _laid_out(draw, tokens, sizes, random.choice(["alone", "heads first", "side by side"]))
        for tensor in (key, value):  # what is stored nowhere must be read from the pool
            tensor[batch.slots < 0] = torch.nan
        sinks = 2 * draw(form.heads) + 2 if form.sinks else None
        settings = {"scaling": form.scaling, "window": form.window, "softcap": form.softcap, "sinks": sinks}
        return cls(form, pool, batch, query, key, value, settings)

    @property
    def call(self) -> AttentionCall:
        return AttentionCall(**self.settings)

    def expected(self) -> Tensor:
        return oracle.attention(
            self.pool.keys[0], self.pool.values[0], self.batch, self.query, self.key, self.value, **self.settings
        )

    def check(self, attention: Callable[[KVPool, Batch], Attention]) -> Tensor:
        """Attend, and compare the answer and each bit of the pool with what they must be."""
        expected = self.expected()
        after = [memory[0].clone() for memory in (self.pool.keys, self.pool.values)]
        for token, slot in enumerate(self.batch.slots.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, self.form.block_size)
                after[0][block, offset] = self.key[token]
                after[1][block, offset] = self.value[token]
        with poisoned():
            out = attention(self.pool, self.batch).attend(0, self.query, self.key, self.value, self.call)
        self.compare(out, expected)
        for memory, wanted in zip((self.pool.keys[0], self.pool.values[0]), after, strict=True):
            # From block 1 on: the null block is there to be written.
            assert same_bits(memory[1:], wanted[1:]), "the pool holds something else than it did, and the new tokens"
        return out

    def compare(self, out: Tensor, expected: Tensor) -> None:
        assert out.shape == expected.shape
        assert out.dtype == self.query.dtype
        assert out.device == self.query.device
        first = 0
        for index, row in enumerate(self.batch.rows):
            last = first + len(row.tokens)
            if row.table[0]:  # nobody reads what a row of the null block gets
                error = distance(out[first:last], expected[first:last])
                told = f"row {index}: {len(row.tokens)} tokens from {row.start} on, table {row.table}, {self.form}"
                assert error < TOLERANCES[out.dtype], f"error {error:.2g} in {told}"
            first = last


def distance(out: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; NaN where there is any."""
    return float((out.double() - expected).norm() / expected.norm())


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


class poisoned:
    """While inside, new memory that nobody has written yet holds NaN."""

    def __enter__(self) -> None:
        self._before = torch.are_deterministic_algorithms_enabled()
        # Of the deterministic mode only this part is wanted: `torch.utils.deterministic.fill_uninitialized_memory`.
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self._before)


def _written(rows: list[Row], block_size: int, device: torch.device | str) -> Tensor:
    """Slots that hold something before the step."""
    slots = set()
    for row in rows:
        for position in range(row.start if row.store else row.context):
            slots.add(row.table[position // block_size] * block_size + position % block_size)
    return torch.tensor(sorted(slots - set(range(block_size))), dtype=torch.int64, device=device)


def _laid_out(
    draw: Callable[..., Tensor], tokens: int, sizes: list[tuple[int, int]], layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (tokens, heads, size) as models leave them in memory."""
    if layout == "side by side":
        widths = [heads * size for heads, size in sizes]
        parts = draw(tokens, sum(widths) + 8).split([*widths, 8], dim=1)
        query, key, value = (part.unflatten(1, size) for part, size in zip(parts, sizes, strict=False))
    elif layout == "heads first":
        query, key, value = (draw(heads, tokens, size).transpose(0, 1) for heads, size in sizes)
    else:
        query, key, value = (draw(tokens, *size) for size in sizes)
    return query, key, value
