"""Who shares leading blocks in a step, as it is found from the block tables."""

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatpage.model.batch import Row
from chatpage.model.flat import FlatRows
from chatpage.model.plan import TILE, Kind, Sharing, find_sharing, make_plan

SIZE = TILE  # tokens of a block, so that each shared block counts


def decode(table: list[int]) -> Row:
    """One token, in the last of these blocks."""
    return Row([1], len(table) * SIZE - 1, array("i", table))


def found(*rows: Row) -> list[Sharing]:
    return find_sharing(FlatRows.of(rows, SIZE))


@pytest.mark.parametrize(
    ("tables", "groups"),
    [
        ([[3, 4]], []),
        ([[3, 4], [5, 4]], []),  # the same block behind another one is another text
        ([[3, 4], [3, 5]], [([0, 1], 1)]),
        ([[3, 4], [3, 4]], [([0, 1], 1)]),  # the block of the token itself is a row's own
        ([[3, 4, 9], [7, 8], [3, 4, 6], [7, 9]], [([0, 2], 2), ([1, 3], 1)]),
        ([[3, 4, 9], [3, 4, 7], [3, 8]], [([0, 1, 2], 1)]),  # as much is saved, by fewer groups
        ([[3, 4, 5, 9], [3, 4, 5, 7], [3, 8]], [([0, 1], 3)]),
        ([[3, 4, 5, 9], [3, 4, 5, 7], [3, 6, 5, 1], [3, 6, 5, 2]], [([0, 1], 3), ([2, 3], 3)]),
        ([[3, 4, 5, 9], [3, 8], [3]], [([0, 1], 1)]),
    ],
)
def test_groups_save_the_most(tables: list[list[int]], groups: list[tuple[list[int], int]]) -> None:
    assert [(sharing.rows, sharing.tokens // SIZE) for sharing in found(*map(decode, tables))] == groups


def test_chunks_do_not_share() -> None:
    chunk = Row([1, 2], 2 * SIZE, array("i", [3, 4, 5]))
    assert found(decode([3, 4]), chunk) == []


def test_what_is_shared_ends_at_whole_tiles() -> None:
    rows = [Row([1], 90, array("i", [*range(1, 6), last])) for last in (8, 9)]
    assert [sharing.tokens for sharing in find_sharing(FlatRows.of(rows, 16))] == [64]


@given(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_groups_are_apart_and_truly_share(tables: list[list[int]]) -> None:
    groups = found(*map(decode, tables))
    members = [row for sharing in groups for row in sharing.rows]
    assert len(members) == len(set(members))
    for sharing in groups:
        blocks = sharing.tokens // SIZE
        assert len(sharing.rows) >= 2
        assert blocks >= 1
        assert all(blocks < len(tables[row]) for row in sharing.rows)
        assert len({tuple(tables[row][:blocks]) for row in sharing.rows}) == 1
    everybody = min(map(len, tables)) - 1
    heads = np.array([table[:everybody] for table in tables])
    common = int((heads == heads[0]).all(axis=0).cumprod().sum()) if everybody else 0
    assert sum(sharing.saved for sharing in groups) >= (len(tables) - 1) * common * SIZE


@pytest.mark.parametrize(
    ("sessions", "shared", "own", "pays"),
    [(2, 64, 32, False), (64, 64, 32, False), (2, 256, 32, True), (2, 2048, 128, False), (64, 2048, 128, True)],
)
def test_keys_are_shared_where_that_was_faster(sessions: int, shared: int, own: int, pays: bool) -> None:
    """As it was measured on an H200: see benchmarks/RESULTS.md."""
    trunk, size = range(1, shared // 16 + 1), 16
    rows = [
        Row([1], shared + own - 1, array("i", [*trunk, *range(1000 + i * 40, 1020 + i * 40)])) for i in range(sessions)
    ]
    flat = FlatRows.of(rows, size)
    groups = find_sharing(flat)
    assert [sharing.tokens for sharing in groups] == [shared]
    plan = make_plan(flat, groups, Kind(32, 8, None), room=sessions, processors=132, queries=64)
    assert bool(len(plan.shared)) == pays
