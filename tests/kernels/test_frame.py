"""What a recorded step reads: a plan that fits its frame, and rows that are not there."""

from random import Random

import numpy as np
import pytest

from chatpage.model.batch import Row
from chatpage.model.flat import FlatRows
from chatpage.model.frame import Form, Frame, sizes
from chatpage.model.plan import OWN_KEYS, Kind, find_sharing, make_plan

PROCESSORS = 132
KINDS = [Kind(32, 8, None), Kind(16, 8, 100), Kind(4, 4, None), Kind(8, 1, None)]


def draw_rows(random: Random, count: int, block_size: int, *, short: bool = False) -> list[Row]:
    """Decodes of all lengths, or of no more than a task has, some behind a common prefix."""
    free = iter(range(1, 10**6))
    own = [1, 2, 60] if short else [1, 2, 60, 300, 5000]
    prefix = [next(free) for _ in range(random.randint(1, (OWN_KEYS - 60) // block_size if short else 40))]
    rows = []
    for _ in range(count):
        head = prefix[: random.randint(0, len(prefix))] if random.random() < 0.7 else []
        context = len(head) * block_size + random.choice(own)
        table = head + [next(free) for _ in range(-(-context // block_size) - len(head))]
        rows.append(Row([random.randrange(100)], context - 1, table))
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_every_key_is_read_once(seed: int) -> None:
    """Own and shared tasks of a row cover its context, or its window, without gap and overlap, at the right blocks."""
    random = Random(seed)
    rows = draw_rows(random, random.choice([1, 2, 7, 40]), 16)
    flat = FlatRows.of(rows, 16)
    for kind in KINDS:
        plan = make_plan(
            flat,
            find_sharing(flat),
            kind,
            room=64,
            processors=PROCESSORS,
            queries=16,
            always=random.random() < 0.5,
        )
        for index, row in enumerate(rows):
            first, count, first_shared, shared, place = plan.rows[index, :5]
            spans = [
                (begin, end, table) for owner, begin, end, table in plan.own[first : first + count] if owner == index
            ]
            for task in plan.shared[first_shared : first_shared + shared]:
                assert plan.members[task[0] + place] == index
                spans.append((task[2], task[3], task[4]))
            read = sorted(at for begin, end, _ in spans for at in range(begin, end))
            assert read == list(range(max(0, row.context - (kind.window or row.context)), row.context))
            for begin, end, table in spans:
                assert [flat.tables[table + at // 16] for at in range(begin, end)] == [
                    row.table[at // 16] for at in range(begin, end)
                ]


@pytest.mark.parametrize("seed", range(10))
def test_frames_have_room_for_every_plan(seed: int) -> None:
    random = Random(seed)
    for size in sizes(64, 256):
        if size.form is Form.MIXED:
            continue
        rows = draw_rows(random, random.randint(1, size.rows), 16, short=size.form is Form.ALONE)
        flat = FlatRows.of(rows, 16)
        frame = Frame(size, KINDS, PROCESSORS)
        groups = find_sharing(flat) if size.form is Form.SHARED else []
        plans = {
            kind: make_plan(flat, groups, kind, room=size.rows, processors=PROCESSORS, queries=16, always=True)
            for kind in KINDS
        }
        if size.form is Form.ALONE:
            assert all(plan.most_states == 1 for plan in plans.values())
        numbers = np.full(frame.tables + len(flat.tables), 7, dtype=np.int32)
        assert frame.fill(numbers, rows, flat, [-1] * len(rows), plans) == len(numbers)
        for kind, plan in plans.items():
            own, notes = frame.plans[kind].own.of(numbers), frame.plans[kind].rows.of(numbers)
            assert (own[: len(plan.own)] == plan.own).all()
            for missing in range(len(rows), size.rows):  # the first slot of the null block, for nobody else
                assert notes[missing, 1] == 1
                assert notes[missing, 3] == 0
                assert own[notes[missing, 0]].tolist() == [missing, 0, 1, 0]
