"""The numbers that a recorded step reads: one stretch of int32, in which every table has its place.

    ┌ token ids ┬ sources ┬ positions ┬ slots ┬ sampled ┬ draws ┬ plans … ┬ block tables ┐
    └ as large as the frame's size, always ─────────────────────────────┴ as they are ─┘

What a step leaves empty does nothing: a token without a slot, a task without keys. Decodes that are not there attend to
the null block, so that no row is ever undefined.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from math import prod

import numpy as np

from chatpage.kernels.prefill import queries_per_task
from chatpage.model.batch import Draw, Row
from chatpage.model.flat import FlatRows
from chatpage.model.plan import (
    CHUNK_FIELDS,
    OWN_FIELDS,
    ROW_FIELDS,
    SHARED_FIELDS,
    Ints,
    Kind,
    Plan,
    rows_of_shared,
    tasks_wanted,
)
from chatpage.model.sampler import leaves_logits, uniform

DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512, 1024, 2048)
TOKENS = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


class Form(Enum):
    """What a step does besides attending to own keys."""

    ALONE = 1  # nothing: each decode's keys are one task
    SPLIT = 2  # some decodes are split into tasks
    SHARED = 3  # some decodes share keys
    MIXED = 4  # there are chunks


@dataclass(frozen=True, slots=True)
class Size:
    """What there is room for.

    Attributes:
        rows, tokens: decodes and chunks together.
    """

    form: Form
    rows: int
    tokens: int

    @property
    def decodes(self) -> int:
        return min(self.rows, self.tokens)


def sizes(max_rows: int, max_tokens: int) -> list[Size]:
    """Those that are recorded: of each form the smaller ones first."""
    decodes = [*(rows for rows in DECODES if rows < max_rows), max_rows]
    tokens = [*(tokens for tokens in TOKENS if tokens < max_tokens), max_tokens]
    forms = (Form.ALONE, Form.SPLIT, Form.SHARED)
    alike = [Size(form, rows, rows) for rows in decodes if rows <= max_tokens for form in forms]
    return [size for size in alike if size.form is not Form.SHARED or size.rows > 1] + [
        Size(Form.MIXED, max_rows, count) for count in tokens if count > 1
    ]


def largest(max_rows: int, max_tokens: int) -> list[Size]:
    """Of those, the ones of most tokens."""
    all_sizes = sizes(max_rows, max_tokens)
    most = max(size.tokens for size in all_sizes)
    return [size for size in all_sizes if size.tokens == most]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table begins, and its shape."""

    begin: int
    shape: tuple[int, ...]

    def of(self, numbers):
        """The table, in an array or a tensor that holds the frame."""
        return numbers[self.begin : self.begin + prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True, slots=True)
class PlanPlaces:
    """Where the tables of a plan lie (see `chatpage.model.plan.Plan`)."""

    own: Place
    rows: Place
    shared: Place
    members: Place
    chunks: Place
    shared_rows: int


class Frame:
    """The places of one size.

    Args:
        kinds: of the model's layers.
        processors: of the device.

    Attributes:
        token_ids, sources, positions, slots: (tokens,). A source is the row of the step before that draws the token, or
            −1; a slot is −1 where nothing is stored.
        sampled: (rows,), index of each row's last token.
        wishes: (rows, 4), of float32, and points: (rows,), of float64: see `chatpage.kernels.draw.draw`.
        tables: where the block tables begin.
    """

    def __init__(self, size: Size, kinds: Sequence[Kind], processors: int) -> None:
        self.size = size
        self._length = 0
        self.token_ids = self._take(size.tokens)
        self.sources = self._take(size.tokens)
        self.positions = self._take(size.tokens)
        self.slots = self._take(size.tokens)
        self.sampled = self._take(size.rows)
        self.wishes = self._take(size.rows, 4)
        self.points = self._take(size.rows, 2)
        self.plans = {kind: self._take_plan(kind, processors) for kind in kinds}
        self.tables = self._length

    def _take(self, *shape: int) -> Place:
        place = Place(self._length, shape)
        self._length += -(-prod(shape) // 4) * 4  # tables begin at multiples of 16 bytes
        return place

    def _take_plan(self, kind: Kind, processors: int) -> PlanPlaces:
        size, decodes = self.size, self.size.decodes
        own, shared = tasks_wanted(kind, processors)
        shares = size.form in (Form.SHARED, Form.MIXED) and kind.window is None
        tiles = -(-size.tokens // queries_per_task(kind.heads, kind.kv_heads)) + min(size.rows, size.tokens // 2)
        return PlanPlaces(
            own=self._take(decodes if size.form is Form.ALONE else decodes + own, OWN_FIELDS),
            rows=self._take(decodes, ROW_FIELDS),
            shared=self._take(max(shared, decodes // 2) if shares else 0, SHARED_FIELDS),
            members=self._take(decodes if shares else 0),
            chunks=self._take(tiles if size.form is Form.MIXED else 0, CHUNK_FIELDS),
            shared_rows=rows_of_shared(decodes, kind.group),
        )

    def fill(
        self,
        numbers: Ints,
        rows: Sequence[Row],
        flat: FlatRows,
        sources: Sequence[int],
        plans: Mapping[Kind, Plan],
    ) -> int:
        """Write a step down; says how many numbers there are.

        Args:
            rows: decodes first; `flat` are their numbers.
            sources: of each row, −1 or a row of the step before.
            plans: for `size.decodes` rows.
        """
        numbers[: self.tables] = 0
        token_ids = list(chain.from_iterable([row.tokens for row in rows]))
        count = len(token_ids)
        ends = flat.lengths.cumsum()
        firsts = ends - flat.lengths
        owners = np.arange(len(rows)).repeat(flat.lengths)
        positions = np.arange(count) + (flat.starts - firsts)[owners]
        blocks = flat.tables[flat.heads[owners] + positions // flat.block_size]
        stores = np.array([row.store for row in rows], dtype=bool)[owners]
        self.token_ids.of(numbers)[:count] = token_ids
        self.positions.of(numbers)[:count] = positions
        slots = self.slots.of(numbers)
        slots[:] = -1
        slots[:count] = np.where(stores, blocks * flat.block_size + positions % flat.block_size, -1)
        self.sampled.of(numbers)[: len(rows)] = ends - 1
        self._fill_draws(numbers, [row.sample for row in rows])
        drawn = self.sources.of(numbers)
        drawn[:] = -1
        drawn[firsts] = sources  # a row whose token is drawn has one token
        for kind, plan in plans.items():
            self._fill_plan(numbers, self.plans[kind], plan)
        length = self.tables + len(flat.tables)
        numbers[self.tables : length] = flat.tables
        return length

    def _fill_draws(self, numbers: Ints, draws: list[Draw | None]) -> None:
        """Who is not named takes the largest logit: those too that change the logits, which are drawn afterwards."""
        named = [i for i, draw in enumerate(draws) if draw and not draw.params.greedy and leaves_logits(draw)]
        if named:
            chosen = [draw for i in named if (draw := draws[i])]
            wishes, points = self.wishes.of(numbers).view(np.float32), self.points.of(numbers).view(np.float64)
            params = [draw.params for draw in chosen]
            wishes[named] = np.transpose(
                [
                    [p.temperature for p in params],
                    [p.top_k for p in params],
                    [p.top_p for p in params],
                    [p.min_p for p in params],
                ]
            )
            points[named, 0] = uniform(chosen)

    def _fill_plan(self, numbers: Ints, places: PlanPlaces, plan: Plan) -> None:
        for place, table in (
            (places.own, plan.own),
            (places.rows, plan.rows),
            (places.shared, plan.shared),
            (places.members, plan.members),
            (places.chunks, plan.chunks),
        ):
            place.of(numbers)[: len(table)] = table
        if self.size.form is not Form.MIXED:
            self._fill_up(numbers, places, len(plan.own), len(plan.rows))

    def _fill_up(self, numbers: Ints, places: PlanPlaces, tasks: int, rows: int) -> None:
        """Let each row that is not there attend to the first slot of the null block."""
        missing = np.arange(rows, self.size.decodes)
        own = places.own.of(numbers)[tasks : tasks + len(missing)]
        own[:, 0], own[:, 2] = missing, 1
        notes = places.rows.of(numbers)[rows:]
        notes[:, 0], notes[:, 1] = tasks + missing - rows, 1
