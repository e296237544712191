"""What viewers see, as pure functions: replaying what is visible gives what is visible of the result."""

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatpage.events import Event, Snapshot
from chatpage.web.view import STRANGER, Mirror, aggregate, only_own, whole
from tests.web.story import BLOCK_SIZE, SYSTEM, Story

stories = st.tuples(
    st.integers(0, 2**32), st.integers(5, 60), st.sampled_from([8, 24]), st.sampled_from(["all", "system"])
)


def own_copy(view: Snapshot) -> Snapshot:
    """A view that can be moved on by itself."""
    view = deepcopy(view)
    view._sequences = {s.id: s for session in view.sessions.values() for s in session.sequences.values()}
    return view


def body(snapshot: Snapshot) -> dict:
    return {**snapshot.to_json(scope="", sharing=""), "time": 0}


def visible(mirror: Mirror, viewer: int, events: list[Event]) -> list[Event]:
    """The events as the viewer gets them, numbered by what it has seen."""
    number, seen = mirror.number(viewer), []
    for event in events:
        shown = mirror.apply(event).seen_by(viewer)
        if shown is not None:
            number += 1
            seen.append(shown._replace(seq=number))
    assert number == mirror.number(viewer)
    return seen


@settings(max_examples=60, deadline=None)
@given(stories, st.sampled_from([STRANGER, 1, 2]), st.integers(0, 30))
def test_the_view_of_the_result_is_the_result_of_what_is_visible(told, viewer, late):
    seed, steps, blocks, sharing = told
    story = Story(seed, blocks=blocks, sharing=sharing)
    mirror = Mirror(story.snapshot)
    visible(mirror, viewer, story.more(late))
    view = own_copy(aggregate(mirror, viewer))
    for _ in range(steps):
        view.apply_all(visible(mirror, viewer, story.more()))
        assert body(view) == body(aggregate(mirror, viewer))


@settings(max_examples=30, deadline=None)
@given(stories)
def test_a_mirror_is_the_engines_state(told):
    seed, steps, blocks, sharing = told
    story = Story(seed, blocks=blocks, sharing=sharing)
    plain, mirror = deepcopy(story.snapshot), Mirror(story.snapshot)
    for event in story.more(steps):
        plain.apply(event)
        assert mirror.apply(event).exact == event
    assert body(mirror.snapshot) == body(plain)


@settings(max_examples=40, deadline=None)
@given(stories, st.sampled_from([STRANGER, 1]))
def test_others_are_seen_in_whole_blocks(told, viewer):
    seed, steps, blocks, sharing = told
    story = Story(seed, blocks=blocks, sharing=sharing)
    mirror = Mirror(story.snapshot)
    owner = mirror.owner
    for event in story.more(steps):
        line = mirror.apply(event)
        shown = line.seen_by(viewer)
        if shown is not None and line.owner != viewer:
            assert shown.at % BLOCK_SIZE == 0 or shown.at == -1
            assert shown.fill % BLOCK_SIZE == 0 or shown.fill == -1
    seen = aggregate(mirror, viewer)
    assert seen.system["default"].tokens == len(SYSTEM)
    for session in seen.sessions.values():
        for sequence in session.sequences.values():
            exact = mirror.snapshot.sessions[session.id].sequences[sequence.id].tokens
            assert sequence.tokens == (exact if session.id == viewer else whole(exact, BLOCK_SIZE))
            assert owner[sequence.id] == session.id


def test_a_token_that_fits_into_its_block_is_not_seen_by_others():
    story = Story(0)
    mirror = Mirror(story.snapshot)
    story._ask()
    sequence = story.running[0]
    while sequence.generated < 2:
        story._step()
    visible(mirror, STRANGER, story._taken())
    for _ in range(2 * BLOCK_SIZE):
        story._step()
        kinds = [event.kind for event in visible(mirror, STRANGER, story._taken())]
        match sequence.table.length % BLOCK_SIZE:
            case 0:
                assert kinds == ["publish"]
            case 1:
                assert kinds == ["allocate", "write"]
            case _:
                assert kinds == []


@pytest.mark.parametrize("viewer", [STRANGER, 1])
def test_only_ones_own_rows(viewer: int):
    story = Story(3)
    mirror = Mirror(story.snapshot)
    for event in story.more(80):
        mirror.apply(event)
    shown = only_own(mirror, viewer, "all")
    assert {session["id"] for session in shown["sessions"]} <= {viewer}
    assert shown["blocks"] == mirror.snapshot.counts()
    assert shown["system"][0]["tokens"] == len(SYSTEM)
