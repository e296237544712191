"""Random arrivals, cancels and faults on a small pool; every step is checked, and every answer."""

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from chatpage.cache.pool import BlockPool
from chatpage.errors import RequestError
from chatpage.events import EventLog, Snapshot
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.scheduler import Scheduler, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session
from tests.schedule.fake import ALPHABET, FakeModel, Fault, answer, pin_system, take_step

VISITORS = 4
TOKENS = st.sampled_from([0, 0, 0, *range(ALPHABET)])  # so that prefixes of strangers collide all the time


@dataclass(frozen=True)
class Arrival:
    """A turn in a visitor's session, or a request without a session, in the visitor's domain."""

    visitor: int
    stays: bool
    under_system: bool
    goes_on: bool
    said: list[int]
    count: int


ARRIVALS = st.builds(
    Arrival,
    visitor=st.integers(0, VISITORS - 1),
    stays=st.sampled_from([True, True, False]),
    under_system=st.booleans(),
    goes_on=st.booleans(),
    said=st.lists(TOKENS, min_size=1, max_size=9),
    count=st.integers(1, 8),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Visitors with a session or without, each in a domain of his own or all in one, under a system prompt or none."""

    sequences = Bundle("sequences")

    @initialize(
        num_blocks=st.integers(5, 16),
        block_size=st.integers(1, 4),
        max_sequences=st.integers(1, 4),
        max_step_tokens=st.integers(1, 12),
        system=st.lists(TOKENS, max_size=9),
        alone=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_step_tokens: int,
        system: list[int],
        alone: bool,
    ) -> None:
        events = EventLog()
        self.pool = BlockPool(num_blocks, block_size, events)
        self.view = Snapshot.empty(events, block_size=block_size, num_blocks=num_blocks)
        events.listeners.append(self.view.apply)
        self.scheduler = Scheduler(self.pool, max_sequences=max_sequences, max_step_tokens=max_step_tokens)
        self.model = FakeModel(self.pool)
        self.system = tuple(system[: (num_blocks - 2) * block_size])
        if self.system:
            pin_system(self.scheduler, self.model, self.system)
        self.alone = alone
        self.sessions = 0
        self.visitors = [self.session(n) for n in range(VISITORS)]
        self.limits: dict[int, int] = {}
        self.known: list[Sequence] = []

    # -- what others ask of the scheduler -------------------------------------------------------------------------

    @rule(target=sequences, arrivals=st.lists(ARRIVALS, min_size=1, max_size=4))
    def submit(self, arrivals: list[Arrival]) -> object:
        return multiple(*filter(None, map(self.submit_one, arrivals)))

    def submit_one(self, arrival: Arrival) -> Sequence | None:
        session = self.visitors[arrival.visitor] if arrival.stays else self.session(arrival.visitor, keeps=False)
        if session.active:  # the engine refuses a second turn of a session
            return None
        prompt = self.prompt(session.resting if arrival.goes_on else None, arrival)
        fits = self.fits(len(prompt.tokens) + 1, prompt.system_tokens)
        try:
            self.scheduler.require_room(prompt)
        except RequestError:
            assert not fits
            return None
        assert fits
        sequence = self.scheduler.submit(session, prompt, SamplingParams())
        self.limits[sequence.id] = len(prompt.tokens) + arrival.count
        self.known.append(sequence)
        return sequence

    def prompt(self, last: Sequence | None, arrival: Arrival) -> Prompt:
        """What goes on from the session's last turn, or begins anew."""
        if last is not None:
            return Prompt((*last.tokens, *arrival.said), last.system_tokens)
        system = self.system if arrival.under_system else ()
        return Prompt((*system, *arrival.said), len(system))

    def session(self, domain: int, *, keeps: bool = True) -> Session:
        self.sessions += 1
        return Session(self.sessions, domain if self.alone else "all", keeps=keeps)

    @rule(sequence=sequences)
    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.end(sequence, "abort")
        self.scheduler.end(sequence, "abort")

    @rule(visitor=st.integers(0, VISITORS - 1))
    def close(self, visitor: int) -> None:
        session = self.visitors[visitor]
        for sequence in self.live():
            if sequence.session is session:
                self.scheduler.end(sequence, "abort")
        self.scheduler.wake(session, "the session was closed")
        assert session.resting is None
        assert session.active == 0

    @rule(steps=st.integers(1, 12), fault=st.sampled_from(["none"] * 6 + ["one row", "whole step"]))
    def step(self, steps: int, fault: Fault) -> None:
        for _ in range(steps):
            self.take_step(fault)
            fault = "none"

    # -- one step -------------------------------------------------------------------------------------------------

    def live(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.preempted, *self.scheduler.waiting]

    def fits(self, tokens: int, system_tokens: int) -> bool:
        """Whether a sequence of that length could be in the pool if nobody else were."""
        size = self.pool.block_size
        return -(-tokens // size) - system_tokens // size <= self.pool.num_blocks - len(self.pool.pinned)

    def take_step(self, fault: Fault) -> None:
        oldest = next(iter(self.scheduler.running), None)
        had_work = self.scheduler.has_work
        step = take_step(self.scheduler, self.model, self.limits, fault)
        chosen = [chunk.sequence for chunk in step.chunks]
        assert bool(chosen or step.exhausted) == had_work, "an empty step although there is work"
        assert oldest is None or oldest in chosen or oldest in step.exhausted, "the oldest makes no progress"
        self.check_step(step)

    def check_step(self, step: Step) -> None:
        assert sum(chunk.count for chunk in step.chunks) <= self.scheduler.max_step_tokens
        ids = [chunk.sequence.id for chunk in step.chunks]
        assert len(set(ids)) == len(ids), f"one sequence has two chunks in a step: {ids}"
        for chunk in step.chunks:
            assert chunk.count > 0
            assert chunk.stores or chunk.count == 1
        for sequence in step.exhausted:
            assert not self.fits(len(sequence.tokens), sequence.system_tokens), "ended although it fits"

    # -- after every operation ------------------------------------------------------------------------------------

    @invariant()
    def pool_and_tables_are_sound(self) -> None:
        self.pool.check(self.scheduler.tables())
        assert list(self.view.ref) == self.pool.ref
        assert list(self.view.fill) == self.pool.fill

    @invariant()
    def answers_are_right(self) -> None:
        for sequence in self.known:
            prompt = sequence.tokens[: sequence.prompt_length]
            assert sequence.tokens[sequence.prompt_length :] == answer(prompt, sequence.generated)

    @invariant()
    def everybody_is_where_his_state_says(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_sequences
        for queue in (scheduler.running, scheduler.preempted):
            assert [s.id for s in queue] == sorted(s.id for s in queue), "not oldest first"
        assert all(s.state in ("prefill", "decode", "queued") for s in scheduler.running)
        assert all((s.state, s.table.blocks, s.computed) == ("preempted", [], 0) for s in scheduler.preempted)
        assert all((s.state, s.table.blocks) == ("queued", []) for s in scheduler.waiting)
        for session in scheduler.resting:
            assert session.keeps
            assert session.resting is not None
            assert session.resting.state == "resting"
        for session in self.visitors:
            assert session.active == sum(s.session is session for s in self.live())
            assert (session.resting is not None) == (session in scheduler.resting)
            runs = any(s.session is session for s in scheduler.running)
            assert not (runs and session.resting), "the last turn's table rests although the next one runs"

    @invariant()
    def the_view_knows_who_is_there(self) -> None:
        shown = {n for session in self.view.sessions.values() for n in session.sequences}
        rested = {s.resting.id for s in self.scheduler.resting if s.resting}
        assert shown == {s.id for s in self.live()} | rested

    # -- the end --------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Left to itself, everybody comes to an end; then only what can be found or is pinned is left."""
        if not hasattr(self, "scheduler"):
            return
        self.finish()
        self.answers_are_right()
        for session in list(self.scheduler.resting):
            self.scheduler.wake(session, "closed")
        self.pool.check([])
        assert self.pool.available == self.pool.num_blocks - len(self.pool.pinned)
        assert self.view.sessions == {}

    def finish(self) -> None:
        live = self.live()
        most = sum(self.limits[s.id] for s in live) * len(live)
        while self.scheduler.has_work:
            assert most, "it goes on for ever"
            most -= 1
            self.take_step("none")
        for sequence in live:
            is_too_long = not self.fits(len(sequence.tokens), sequence.system_tokens)
            assert is_too_long or len(sequence.tokens) == self.limits[sequence.id]
