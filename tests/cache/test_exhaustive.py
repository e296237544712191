"""Every sequence of operations up to a length, on a pool of four blocks."""

from collections.abc import Callable

import pytest

from chatpage.cache.pool import BlockPool
from chatpage.cache.table import BlockTable
from tests.cache import test_machine as faults
from tests.cache.exhaustive import search


def test_nothing_goes_wrong_in_seven_operations() -> None:
    found = search(7, prompts=2)
    assert found.states > 25_000
    assert found.sequences > 10**7


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (BlockPool, "needs_copy", faults.misses_the_copy_of_a_shared_block),
        (BlockPool, "_forget", faults.leaves_an_evicted_block_in_the_tree),
        (BlockTable, "append_in_place", faults.writes_in_place_what_others_hold_or_find),
        (BlockTable, "_climb", faults.stays_at_the_node_of_a_block_that_it_gave_back),
        (BlockTable, "release", faults.releases_twice),
    ],
)
def test_the_search_finds_a_cache_that(
    owner: type, name: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match="after "):
        search(6, prompts=2)
