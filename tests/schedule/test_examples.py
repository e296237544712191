"""The scheduler's decisions, one by one, on pools small enough to count."""

from collections.abc import Callable

import pytest

from chatpage.errors import RequestError
from chatpage.events import EventLog
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.scheduler import Scheduler, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session
from tests.schedule.fake import WHOLE_STEP, FakeModel, FakePool, answer, pin_system, take_step


class Desk:
    """A scheduler, its model, and somebody who submits turns to it."""

    def __init__(self, *, num_blocks: int = 50, block_size: int = 4, max_sequences: int = 8, budget: int = 100) -> None:
        self.pool = FakePool(num_blocks, block_size, EventLog())
        self.scheduler = Scheduler(self.pool, max_sequences=max_sequences, max_step_tokens=budget)
        self.model = FakeModel(self.pool)
        self.limits: dict[int, int] = {}
        self.sessions = 0

    def session(self, domain: str | None = None, *, keeps: bool = True) -> Session:
        self.sessions += 1
        return Session(self.sessions, domain or self.sessions, keeps=keeps)

    def submit(self, length: int, count: int = 5, session: Session | None = None, *, first: int = 0) -> Sequence:
        """A prompt of that many tokens, the first of which tells it from others, and room for `count` more."""
        prompt = (first, *([1] * (length - 1)))
        sequence = self.scheduler.submit(session or self.session(), Prompt(prompt), SamplingParams())
        self.limits[sequence.id] = length + count
        return sequence

    def ask(self, length: int, replies: int, count: int = 5, session: Session | None = None) -> list[Sequence]:
        """The same, with so many replies."""
        first = self.submit(length, count, session)
        turn = [first, *(self.scheduler.submit_reply(first, choice) for choice in range(1, replies))]
        self.limits.update({sequence.id: length + count for sequence in turn})
        return turn

    @property
    def used(self) -> int:
        return self.pool.num_blocks - self.pool.available

    def step(self) -> Step:
        return take_step(self.scheduler, self.model, self.limits)

    def chunks(self) -> list[tuple[int, int, int]]:
        """One step: sequence, start and count of each chunk."""
        return [(chunk.sequence.id, chunk.start, chunk.count) for chunk in self.step().chunks]

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_decodes_and_chunks_share_a_step() -> None:
    desk = Desk(budget=20)
    desk.submit(6)
    assert desk.chunks() == [(1, 0, 6)]
    desk.submit(15)
    assert desk.chunks() == [(1, 6, 1), (2, 0, 9)]
    assert desk.chunks() == [(1, 7, 1), (2, 9, 6)]
    assert desk.chunks() == [(1, 8, 1), (2, 15, 1)]


def test_prompts_take_as_much_as_many_decodes() -> None:
    desk = Desk(budget=8)
    for _ in range(3):
        desk.submit(1)
    desk.submit(20)
    assert desk.chunks() == [(1, 0, 1), (2, 0, 1), (3, 0, 1), (4, 0, 5)]
    assert desk.chunks() == [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 5, 3)]


def test_a_budget_that_is_spent_leaves_the_newest_out() -> None:
    desk = Desk(budget=2)
    for _ in range(3):
        desk.submit(1)
    assert desk.chunks() == [(1, 0, 1), (2, 0, 1)]
    assert desk.chunks() == [(1, 1, 1), (2, 1, 1)]


def test_no_more_run_than_allowed() -> None:
    desk = Desk(max_sequences=2)
    first, _, third = (desk.submit(3) for _ in range(3))
    assert [chunk[0] for chunk in desk.chunks()] == [1, 2]
    desk.scheduler.end(first, "abort")
    assert [chunk[0] for chunk in desk.chunks()] == [2, 3]
    assert third.state == "decode"


def test_what_was_found_is_not_computed() -> None:
    desk = Desk()
    desk.submit(10, session=desk.session("shared"))
    desk.finish()
    again = desk.submit(10, session=desk.session("shared"))
    (chunk,) = desk.step().chunks
    assert (chunk.start, chunk.count, chunk.stores) == (9, 1, False), "only for its logits"
    assert again.cached == 10
    stranger = desk.submit(10)
    desk.step()
    assert stranger.cached == 0


def test_a_system_prompt_that_ends_inside_a_block_is_copied_once_by_each() -> None:
    desk = Desk()
    pin_system(desk.scheduler, desk.model, [2] * 6)
    for _ in range(2):
        prompt = Prompt((2, 2, 2, 2, 2, 2, 0, 1), 6)
        sequence = desk.scheduler.submit(desk.session(), prompt, SamplingParams())
        desk.limits[sequence.id] = 13
        step = desk.step()
        assert sequence.cached == 6
        assert [(chunk.start, chunk.count) for chunk in step.chunks] == [(6, 2)]
        ((source, target),) = step.copies
        assert source in desk.pool.pinned
        assert sequence.table.blocks[1] == target
        desk.finish()
        assert sequence.tokens[8:] == answer(prompt.tokens, 5)


def test_the_next_turn_goes_on_from_the_table_that_rests() -> None:
    desk = Desk()
    session = desk.session()
    first = desk.submit(6, session=session)
    desk.finish()
    assert first.state == "resting"
    assert list(desk.scheduler.resting) == [session]
    second = desk.scheduler.submit(session, Prompt((*first.tokens, 0, 0)), SamplingParams())
    desk.limits[second.id] = 15
    assert desk.chunks() == [(2, 10, 3)], "the last drawn token never ran"
    assert not desk.scheduler.resting
    desk.pool.check(desk.scheduler.tables())


# -- a pool that is full -----------------------------------------------------------------------------------------------


def test_resting_tables_go_first_and_the_longest_rested_before_all() -> None:
    desk = Desk(num_blocks=8)
    sessions = [desk.session() for _ in range(3)]
    for session in sessions:
        desk.submit(6, count=2, session=session)
        desk.finish()
    assert list(desk.scheduler.resting) == sessions
    desk.submit(14, count=2)
    step = desk.step()
    assert (len(step.chunks), step.preempted) == (1, [])
    assert list(desk.scheduler.resting) == sessions[1:]


def test_the_newest_is_preempted_and_comes_back_before_all_who_wait() -> None:
    desk = Desk(num_blocks=6, max_sequences=3)
    first, second, third = (desk.submit(8, count=8) for _ in range(3))
    desk.step()
    late = desk.submit(1, count=1)
    step = desk.step()
    assert [chunk.sequence for chunk in step.chunks] == [first, second]
    assert step.preempted == [third]
    assert (list(third.table.blocks), third.computed, third.state) == ([], 0, "preempted")
    while first.state != "resting":
        desk.step()
        assert late.state == "queued"
    desk.finish()
    for sequence in (first, second, third):
        assert sequence.tokens[8:] == answer(sequence.tokens[:8], 8)


def test_new_arrivals_push_nobody_out() -> None:
    desk = Desk(num_blocks=4)
    first = desk.submit(12, count=3)
    desk.step()
    waiting = desk.submit(8)
    for _ in range(2):
        assert [chunk.sequence for chunk in desk.step().chunks] == [first]
    assert desk.step().chunks[0].sequence is waiting


def test_an_allocation_that_fails_takes_nothing_from_those_who_are_in_the_step() -> None:
    desk = Desk(max_sequences=1)
    early, late = desk.submit(5), desk.submit(5)
    early.session.served = 50
    assert [chunk.sequence for chunk in desk.step().chunks] == [late]
    desk.scheduler.max_sequences = 2
    desk.pool.fail_for = early.id
    step = desk.step()
    assert ([chunk.sequence for chunk in step.chunks], step.preempted) == ([late], [early])
    assert [chunk.sequence for chunk in desk.step().chunks] == [late, early]
    desk.finish()
    assert early.tokens[5:] == late.tokens[5:] == answer(early.tokens[:5], 5)


@pytest.mark.parametrize(("length", "refused"), [(15, False), (16, True)])
def test_what_can_never_fit_is_refused(length: int, refused: bool) -> None:
    """Four blocks of four: 15 tokens and one that is drawn."""
    scheduler = Desk(num_blocks=4).scheduler
    if not refused:
        scheduler.require_room(Prompt((0,) * length))
        return
    with pytest.raises(RequestError, match=r"needs 5 blocks of 4 tokens, but the pool has 4"):
        scheduler.require_room(Prompt((0,) * length))


def test_one_that_grows_to_the_end_of_the_pool_is_exhausted() -> None:
    desk = Desk(num_blocks=2)
    sequence = desk.submit(5, count=99)
    desk.finish()
    assert len(sequence.tokens) == 9, "eight slots, and the token that was drawn from the last of them"


# -- the same asked twice at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["shared", None])
def test_what_two_ask_at_once_is_computed_once_where_they_may_share(domain: str | None) -> None:
    desk = Desk(budget=6)
    twins = [desk.submit(10, session=desk.session(domain)) for _ in range(2)]
    if domain is None:
        assert [desk.chunks(), desk.chunks()] == [[(1, 0, 6)], [(1, 6, 4), (2, 0, 2)]]
    else:
        # The second starts from two whole blocks; the first one's tail is the first one's own.
        assert [desk.chunks(), desk.chunks()] == [[(1, 0, 6)], [(1, 6, 4)]]
        assert desk.chunks() == [(1, 10, 1), (2, 8, 2)]
    desk.finish()
    assert [twin.tokens[10:] for twin in twins] == [answer(twins[0].tokens[:10], 5)] * 2


@pytest.mark.parametrize(
    "ends",
    [lambda desk, twin: desk.scheduler.end(twin, "abort"), lambda desk, twin: desk.scheduler.fail(twin, "error")],
    ids=["ends", "fails"],
)
def test_who_waits_for_a_block_computes_it_if_the_other(ends: Callable[[Desk, Sequence], object]) -> None:
    desk = Desk(budget=6)
    first, second = (desk.submit(10, session=desk.session("shared")) for _ in range(2))
    desk.step()
    assert (first.computed, second.state) == (6, "queued")
    ends(desk, first)
    desk.step()
    assert second.is_running
    assert second.cached == (6 if first.state == "resting" else 0), "what failed is not found"
    desk.finish()
    assert second.tokens[10:] == answer(second.tokens[:10], 5)


# -- several replies to one prompt -------------------------------------------------------------------------------------


def test_a_fork_inside_a_block_is_copied_by_all_but_the_last() -> None:
    desk = Desk()
    first, second, third = desk.ask(6, replies=3)
    assert desk.chunks() == [(1, 0, 6)], "the others wait until the prompt is computed"
    step = desk.step()
    assert [(chunk.start, chunk.count, chunk.stores) for chunk in step.chunks] == [
        (6, 1, True),
        (5, 1, False),  # only for its own draw
        (5, 1, False),
    ]
    assert first.table.blocks == second.table.blocks == third.table.blocks
    assert (step.copies, desk.used) == ([], 2)
    whole, shared = first.table.blocks
    step = desk.step()
    assert [source for source, _ in step.copies] == [shared, shared]
    assert [list(s.table.blocks) for s in (first, second, third)] == [[whole, 3], [whole, 4], [whole, shared]]
    assert desk.used == 4
    desk.finish()
    for choice, sequence in enumerate((first, second, third)):
        assert sequence.tokens[6:] == answer(sequence.tokens[:6], 5, choice)


def test_a_first_reply_that_ends_before_the_prompt_is_computed_leaves_it_to_the_second() -> None:
    desk = Desk(budget=6)
    first, second, third = desk.ask(10, replies=3)
    assert desk.chunks() == [(1, 0, 6)]
    desk.scheduler.end(first, "abort")
    assert desk.chunks() == [(2, 6, 4)], "from what is found of the first one's"
    assert desk.chunks() == [(2, 10, 1), (3, 8, 2)], "whole blocks are found, as by anybody"
    assert (second.cached, third.cached) == (6, 8)
    desk.finish()
    assert [s.tokens[10:] for s in (second, third)] == [answer(first.tokens, 5, choice) for choice in (1, 2)]


def test_a_reply_that_has_no_room_for_its_first_write_comes_back_later() -> None:
    """Three blocks: the prompt takes two, so of three that fork two may write, and later one."""
    desk = Desk(num_blocks=3)
    first, second, third = turn = desk.ask(6, replies=3, count=4)
    desk.step()
    assert [chunk.sequence for chunk in desk.step().chunks] == turn, "a fork takes no block"
    step = desk.step()
    assert ([chunk.sequence for chunk in step.chunks], step.preempted) == ([first, second], [third])
    step = desk.step()
    assert ([chunk.sequence for chunk in step.chunks], step.preempted) == ([first], [second])
    assert first.session.resting == [first]
    assert [chunk.sequence for chunk in desk.step().chunks] == [second, third]
    desk.finish()
    for choice, sequence in enumerate(turn):
        assert sequence.tokens[6:] == answer(sequence.tokens[:6], 4, choice)


def test_each_reply_rests_when_it_has_ended() -> None:
    desk = Desk()
    told: list[str] = []
    desk.pool.events.listeners.append(lambda event: told.append(event.state))
    session = desk.session()
    first, second = desk.ask(6, replies=2, session=session)
    for _ in range(3):
        desk.step()
    desk.scheduler.end(first, "abort")
    assert (session.resting, told.count("resting")) == ([first], 1)
    desk.finish()
    assert (session.resting, told.count("resting")) == ([first, second], 2)
    desk.scheduler.keep(session, 1)
    assert (session.resting, first.state, list(first.table.blocks)) == ([second], "done", [])


# -- fairness ----------------------------------------------------------------------------------------------------------


def test_who_was_served_least_is_admitted_first() -> None:
    desk = Desk(max_sequences=1)
    greedy, modest = desk.session(), desk.session()
    desk.submit(20, count=2, session=greedy)
    desk.submit(3, count=1, session=modest)
    desk.step()
    desk.submit(20, count=1, session=desk.session())
    desk.finish()
    assert greedy.served > modest.served > 0

    running = desk.submit(3, count=3)
    desk.step()
    first_to_ask = desk.submit(3, count=1, session=greedy)
    later = desk.submit(3, count=1, session=modest)
    while running.state != "resting":
        desk.step()
    assert (desk.step().chunks[0].sequence, first_to_ask.state) == (later, "queued")


def test_having_been_away_earns_no_credit() -> None:
    desk = Desk(max_sequences=1)
    regular = desk.session()
    regular.served = 50
    desk.submit(3, count=9, session=regular)
    newcomer = desk.session()
    desk.submit(3, session=newcomer)
    assert newcomer.served == 50


def test_a_session_with_many_requests_does_not_starve_another() -> None:
    """Requests that share a session's count take turns with somebody else's."""
    desk = Desk(max_sequences=1, budget=4)
    crowd, single = desk.session(keeps=False), desk.session(keeps=False)
    for _ in range(5):
        desk.submit(8, count=1, session=crowd)
    alone = desk.submit(8, count=1, session=single)
    order = []
    while desk.scheduler.has_work:
        order += [chunk.sequence for chunk in desk.step().chunks]
    assert order.index(alone) == 2, "right after the first of the crowd"


def test_the_end_comes_once() -> None:
    desk = Desk()
    sequence = desk.submit(6)
    desk.step()
    desk.scheduler.end(sequence, "abort")
    seen = desk.pool.events.seq
    desk.scheduler.end(sequence, "abort")
    assert desk.pool.events.seq == seen


def test_what_a_failed_turn_wrote_last_is_not_found() -> None:
    desk = Desk()
    sequence = desk.submit(6, session=desk.session("shared"))
    take_step(desk.scheduler, desk.model, desk.limits, WHOLE_STEP)
    assert sequence.state == "done"
    assert desk.pool.available == desk.pool.free == desk.pool.num_blocks
    again = desk.submit(6, session=desk.session("shared"))
    desk.finish()
    assert again.cached == 0
    assert again.tokens[6:] == answer(again.tokens[:6], 5)


def test_of_two_that_fail_in_one_step_the_second_leaves_nothing_either() -> None:
    """It only shares a block with the first one, and may be innocent. What only it holds is below somebody else's."""
    desk = Desk()

    def ask(system_tokens: int) -> Sequence:
        session = desk.session("shared", keeps=False)
        sequence = desk.scheduler.submit(session, Prompt((0, 1, 1, 1), system_tokens), SamplingParams())
        desk.limits[sequence.id] = 20
        return sequence

    other, first = ask(0), ask(1)  # neither waits for the other, as they may not always share
    second = desk.scheduler.submit_reply(first, 1)
    desk.limits[second.id] = 20
    while second.computed < 9:
        desk.step()
    assert other.table.blocks[0] != first.table.blocks[0] == second.table.blocks[0]
    take_step(desk.scheduler, desk.model, desk.limits, broken=0b110)
    assert (first.state, second.state) == ("done", "preempted")
    assert [node.block for node, _ in second.table.matches(second.tokens)] == [other.table.blocks[0]]
    desk.finish()
    assert second.tokens[4:] == answer(second.tokens[:4], 16, 1)


def test_tables_rest_on_where_their_blocks_would_not_do() -> None:
    """Ten blocks: four run, two sessions rest with two each, and nine are asked for."""
    desk = Desk(num_blocks=10)
    for first in (1, 2):
        desk.submit(6, 2, first=first)
        desk.finish()
    desk.submit(14, first=3)
    desk.step()
    desk.submit(36, first=4)
    desk.step()
    assert len(desk.scheduler.resting) == 2
    assert len(desk.scheduler.waiting) == 1


def test_pinned_blocks_of_resting_tables_are_no_room() -> None:
    """Ten blocks: four pinned, one more at rest, four run; two are asked for, and one and a resting one are there."""
    desk = Desk(num_blocks=10)
    system = tuple([2] * 16)
    pin_system(desk.scheduler, desk.model, system)

    def ask(*own: int) -> Sequence:
        sequence = desk.scheduler.submit(desk.session(), Prompt((*system, *own), 16), SamplingParams())
        desk.limits[sequence.id] = len(sequence.tokens) + len(own)
        return sequence

    ask(1, 1)
    desk.finish()
    running = desk.submit(15, first=2)
    desk.step()
    desk.submit(12, first=1)
    step = desk.step()
    assert not step.preempted
    assert running.is_running
    assert len(desk.scheduler.resting) == 1
    assert len(desk.scheduler.waiting) == 1
