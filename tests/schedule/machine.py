"""Random arrivals, ends and faults on a small pool; every step is checked against what it should have been."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from copy import deepcopy
from dataclasses import replace
from random import Random
from typing import Any, Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chatpage.cache.pool import PoolFull
from chatpage.cache.prefix import SYSTEM
from chatpage.errors import RequestError
from chatpage.events import FREE, IDLE, USED, Event, EventLog, Snapshot
from chatpage.schedule.beam import Beams
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.scheduler import Chunk, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session
from tests.cache.naive import deep_state
from tests.schedule.clerk import Before, Clerk
from tests.schedule.fake import ALPHABET, ENDS, FakeFlight, FakeModel, FakePool, Oracle, deliver, pin_system
from tests.schedule.searches import Alone, Searches, Watched

VISITORS = 4
TOKENS = st.sampled_from([0, 0, 0, *range(ALPHABET)])  # so that prefixes of strangers collide all the time
SAID = st.lists(TOKENS, min_size=1, max_size=9)
COUNTS = st.integers(1, 8)
WHO = st.integers(0, 15)
REPLIES = st.sampled_from([1, 1, 1, 2, 3, 5])
CHOICE = st.none() | st.integers(0, 4)
STEPS = st.sampled_from([0, 1, 2, 4, 20, 20])
MASKS = st.lists(st.just(0) | st.integers(0, 4095), max_size=16)
PENALTIES = [-1.0, 0.0, 1.0]  # of length
STOPPING: list[bool | Literal["never"]] = [False, True, "never"]  # early
WISHES = st.builds(
    Beams,
    width=st.just(5),
    length_penalty=st.sampled_from(PENALTIES),
    early_stopping=st.sampled_from(STOPPING),
    returned=st.integers(1, 5),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Visitors with a session or without, each in a domain of his own or all in one, under a system prompt or none.

    A prompt is replied to once or several times, or its likeliest answers are searched for. Steps are read back before
    the next one is scheduled, or after it was launched.
    """

    @initialize(
        num_blocks=st.integers(4, 12) | st.integers(10, 24),
        block_size=st.integers(1, 4),
        max_sequences=st.integers(1, 6) | st.integers(5, 12),
        max_step_tokens=st.integers(1, 12),
        system=st.lists(TOKENS, max_size=9),
        alone=st.booleans(),
        overlaps=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_step_tokens: int,
        system: list[int],
        alone: bool,
        overlaps: bool,
    ) -> None:
        self.events = EventLog()
        self.pool = FakePool(num_blocks, block_size, self.events)
        self.view = Snapshot.empty(self.events, block_size=block_size, num_blocks=num_blocks)
        self.heard: list[Event] = []
        self.kept = [deepcopy(self.view)]
        self.events.listeners.append(self.hear)
        self.scheduler = Watched(self.pool, max_sequences=max_sequences, max_step_tokens=max_step_tokens)
        self.model = FakeModel(self.pool)
        self.places = max_sequences
        self.overlaps = overlaps
        self.flight: FakeFlight | None = None
        self.lost: Counter[int] = Counter()  # how often each sequence lost its blocks
        self.lost_at_launch: dict[int, int] = {}  # by the identity of a chunk in flight
        self.known: dict[int, Sequence] = {}
        self.turns: dict[int, list[Sequence]] = {}  # of each sequence all replies to its prompt, itself included
        self.choice: dict[int, int] = {}  # which of them it is
        self.domain: dict[int, Hashable] = {}  # of each published block
        self.names: dict[int, int] = {}  # how many tokens of each published block can be found
        self.oracles: dict[int, Oracle | Alone] = {}
        self.right: dict[int, int] = {}  # how many tokens of each sequence that is no beam were found to be right
        self.limits: dict[int, int] = {}
        self.cut: set[int] = set()  # ended early, because an allocation was made to fail
        self.served: dict[Session, int] = {}
        self.era = 0  # ends whenever a block is lost that somebody might have found
        self.entered: dict[int, int] = {}  # the era in which each sequence was started last
        self.computed: set[tuple[Any, ...]] = set()  # whole blocks of prompts, in this era
        self.checked = 0  # operations
        self.domains = ["a", "b", "c", "d"] if alone else ["all"]
        self.sessions = 0
        self.asked = 0
        self.system = tuple(system[: (num_blocks - 2) * block_size])
        if self.system:
            pin_system(self.scheduler, self.model, self.system)
        self.clerk = Clerk(self.scheduler, lambda: self.era, admitted=1 if self.system else 0)
        self.searches = Searches(self.scheduler, self.model, self.choice)
        self.scheduler.on_branch = self.branched
        self.visitors = [self.session(n) for n in range(VISITORS)]

    # -- events, heard as they come -------------------------------------------------------------------------------

    def hear(self, event: Event) -> None:
        self.view.apply(event)
        self.heard.append(event)
        kind, block = event.kind, event.block
        if event.sequence in self.known:
            self.hear_of(self.known[event.sequence], event)
        if kind == "publish":
            self.names[block] = event.fill
            self.domain.setdefault(block, SYSTEM)  # only system prompts are computed before anybody is known
        elif kind in ("unpublish", "evict"):
            del self.names[block], self.domain[block]
        is_tail = event.reason == "written by its sole holder" and self.pool.fill[block] < self.pool.block_size
        if kind in ("evict", "preempt") or (kind == "unpublish" and not is_tail):
            self.era += 1
            self.computed.clear()

    def hear_of(self, sequence: Sequence, event: Event) -> None:
        """What happens to the table of one who is known."""
        if event.kind == "preempt":
            self.lost[sequence.id] += 1
            self.clerk.loses(sequence)
        elif event.kind == "fork":
            self.clerk.forks(sequence, self.known[event.parent], event.at)
        elif event.kind == "share" and event.reason != "fork":
            self.check_isolation(sequence, event.block, event.at)
        elif event.kind == "copy":
            self.check_copy(event.source)
            self.clerk.copies(sequence, event.source, event.block)
        elif event.kind == "write":
            self.check_write(event.block)
        elif event.kind == "publish":
            self.check_content(sequence, event.block, event.fill)
        self.clerk.has_slots(sequence, event.at)

    def check_content(self, sequence: Sequence, block: int, fill: int) -> None:
        is_full = fill == self.pool.block_size
        assert is_full or sequence not in self.scheduler.running, "the tail of a turn that goes on is published"
        start = sequence.table.blocks.index(block) * self.pool.block_size
        end = start + fill
        self.domain[block] = SYSTEM if end <= sequence.system_tokens else sequence.table.domain
        states = self.oracles[sequence.id].states(sequence.tokens[:end])
        assert self.model.slots[block][:fill] == states[start:], f"block {block} is not what it is said to be"

    def holders(self, block: int) -> int:
        return sum(block in s.table for session in self.view.sessions.values() for s in session.sequences.values())

    def check_write(self, block: int) -> None:
        """The write rule, at the moment at which a slot is given out."""
        is_free = block not in self.pool.pinned and block not in self.domain
        assert is_free, f"block {block} is written, which is pinned or published"
        assert self.holders(block) == 1, f"block {block} is written, which {self.holders(block)} hold"

    def check_copy(self, source: int) -> None:
        """The write rule asks for it: others hold the block besides the writer, whose table has the copy by now."""
        needed = source in self.pool.pinned or self.names.get(source) == self.pool.block_size or self.holders(source)
        assert needed, f"block {source} is copied although nothing forbids to write it"

    def check_isolation(self, sequence: Sequence, block: int, at: int) -> None:
        domain = self.domain[block]
        if domain != sequence.table.domain:
            assert domain == SYSTEM, f"{sequence.table.domain} found a block of {domain}"
            assert at <= sequence.system_tokens, f"token {at} found behind a prompt of {sequence.system_tokens}"

    # -- who comes ------------------------------------------------------------------------------------------------

    def session(self, visitor: int, *, keeps: bool = True) -> Session:
        self.sessions += 1
        return Session(self.sessions, self.domains[visitor % len(self.domains)], keeps=keeps)

    def pick(self, who: int, among: list[Sequence]) -> Sequence | None:
        return among[who % len(among)] if among else None

    def live(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.preempted, *self.scheduler.waiting]

    def rested(self) -> list[Sequence]:
        return [sequence for session in self.scheduler.resting for sequence in session.resting]

    def one_who_rests(self, visitor: int) -> Session:
        """A visitor with several replies that rest, if there is one."""
        among = [session for session in self.visitors if len(session.resting) > 1] or self.visitors
        return among[visitor % len(among)]

    def may_ask(self, session: Session, prompt: Prompt) -> bool:
        if session.keeps and session.active:  # the engine refuses a second turn of a session
            return False
        fits = self.clerk.fits(len(prompt.tokens) + 1, prompt.system_tokens)
        try:
            self.scheduler.require_room(prompt)
        except RequestError:
            assert not fits
            return False
        assert fits
        return True

    def lifted(self, session: Session) -> int:
        """What counts as served when it asks for something."""
        least = min((s.session.served for s in self.live()), default=0)
        return session.served if session.active else max(session.served, least)

    def submit(self, session: Session, prompt: Prompt, count: int, replies: int = 1) -> list[Sequence]:
        """A turn with so many replies; none of them where it is refused."""
        if not self.may_ask(session, prompt):
            return []
        lifted = self.lifted(session)
        # Every second one ends by what it draws, which nobody knows beforehand; every fifth looks at what it drew.
        limit = len(prompt.tokens) + count if self.asked % 2 else None
        params = SamplingParams(presence_penalty=float(self.asked % 5 == 0))
        self.asked += 1
        first = self.scheduler.submit(session, prompt, params, seed=self.asked, limit=limit)
        assert session.served == lifted, "having been away earns credit"
        self.served[session] = lifted
        turn: list[Sequence] = []
        for choice in range(replies):
            self.welcome(self.scheduler.submit_reply(first, choice) if choice else first, count, turn)
        return turn

    def begin_search(self, session: Session, prompt: Prompt, count: int, wish: Beams) -> None:
        if not self.may_ask(session, prompt):
            return
        lifted = self.lifted(session)
        self.asked += 1
        limit = len(prompt.tokens) + count
        wishes: dict[str, Any] = {"width": wish.width, "candidates": wish.width + len(ENDS)}
        first = self.scheduler.submit(session, prompt, SamplingParams(), limit=limit, **wishes)
        assert session.served == lifted, "having been away earns credit"
        self.served[session] = lifted
        self.know(first, [first], 0, self.searches.begin(first, wish, count))
        self.limits[first.id] = limit
        self.clerk.comes(first, first)

    def branched(self, parent: Sequence, child: Sequence) -> None:
        self.know(child, [child], 0, self.oracles[parent.id])
        self.limits[child.id], self.entered[child.id] = self.limits[parent.id], self.entered[parent.id]
        self.clerk.branches(parent, child)
        self.searches.branched(parent, child)

    def know(self, sequence: Sequence, turn: list[Sequence], choice: int, oracle: Oracle | Alone) -> None:
        number = sequence.id
        self.known[number], self.turns[number], self.choice[number] = sequence, turn, choice
        self.oracles[number] = oracle

    def welcome(self, sequence: Sequence, count: int, turn: list[Sequence]) -> None:
        """Another reply of a turn, which ends a little before the others."""
        number, choice = sequence.id, len(turn)
        turn.append(sequence)
        for same in ("session", "tokens", "system_tokens", "params", "seed", "limit"):
            assert getattr(sequence, same) == getattr(turn[0], same), f"a reply with another {same}"
        self.know(sequence, turn, choice, Oracle(choice))
        self.right[number] = len(sequence.tokens)
        self.limits[number] = len(sequence.tokens) + max(1, count - choice % 3)
        self.clerk.comes(sequence, turn[0])

    @rule(visitor=WHO, stays=st.booleans(), under_system=st.booleans(), said=SAID, count=COUNTS)
    def arrive(self, visitor: int, stays: bool, under_system: bool, said: list[int], count: int) -> None:
        """A first turn, or one that begins anew."""
        session = self.visitors[visitor % VISITORS] if stays else self.session(visitor, keeps=False)
        system = self.system if under_system else ()
        self.submit(session, Prompt((*system, *said), len(system)), count)

    @rule(
        visitor=WHO, stays=st.booleans(), said=SAID, count=COUNTS, replies=st.integers(2, 5), steps=STEPS, keeps=CHOICE
    )
    def reply(
        self, visitor: int, stays: bool, said: list[int], count: int, replies: int, steps: int, keeps: int | None
    ) -> None:
        """Several replies to one prompt; after some steps they fork, part, and rest; and one of them may be kept."""
        session = self.visitors[visitor % VISITORS] if stays else self.session(visitor, keeps=False)
        self.submit(session, self.prompt(session, said, count), count, replies)
        self.step(steps)
        if keeps is not None:
            self.keep(visitor, keeps)

    @rule(
        visitor=WHO,
        stays=st.booleans(),
        said=SAID,
        count=COUNTS,
        wish=WISHES,
        width=st.integers(1, 5),
        number=st.integers(1, 3),
        masks=MASKS,
        keeps=CHOICE,
    )
    def search(
        self,
        visitor: int,
        stays: bool,
        said: list[int],
        count: int,
        wish: Beams,
        width: int,
        number: int,
        masks: list[int],
        keeps: int | None,
    ) -> None:
        """Searches of several visitors; in some steps they part, and lose blocks; and an answer may be kept."""
        width = min(width, self.places)
        wish = replace(wish, width=width, returned=min(wish.returned, width))
        for n in range(number):
            session = self.visitors[(visitor + n) % VISITORS] if stays else self.session(visitor + n, keeps=False)
            self.begin_search(session, self.prompt(session, said, count), count, wish)
        self.make_way(masks)
        if keeps is not None:
            self.keep(visitor, keeps)

    def prompt(self, session: Session, said: list[int], which: int) -> Prompt:
        """What follows one of the replies that rest, or begins anew."""
        if session.resting:
            last = session.resting[which % len(session.resting)]
            return Prompt((*last.tokens, *said), last.system_tokens)
        return Prompt((*self.system, *said), len(self.system))

    @rule(visitor=WHO, said=SAID, count=COUNTS, replies=REPLIES, regrets=st.booleans(), fails=st.booleans())
    def go_on(self, visitor: int, said: list[int], count: int, replies: int, regrets: bool, fails: bool) -> None:
        """The next turn, from any reply that rests; or it ends before it began, and their tables rest as before."""
        session = self.one_who_rests(visitor)
        if rested := session.resting[:]:
            turn = self.submit(session, self.prompt(session, said, count), count, replies)
            if turn and regrets:
                for sequence in turn:
                    (self.scheduler.fail if fails else self.scheduler.end)(sequence, "ended early")
                assert session.resting == rested

    @rule(who=WHO, visitor=WHO, back=st.integers(0, 12), said=st.lists(TOKENS, max_size=9), count=COUNTS)
    def fork(self, who: int, visitor: int, back: int, said: list[int], count: int) -> None:
        """An edit, a branch or a second answer: the head of a turn that runs, waits or rests, and then others."""
        origin = self.pick(who, self.live() + self.rested())
        if origin is None:
            return
        tokens = (*origin.tokens[: max(0, len(origin.tokens) - back)], *said)
        if not tokens:
            return
        known = min(origin.system_tokens, len(origin.tokens) - back, len(tokens))
        session = self.visitors[visitor % VISITORS]
        if visitor % 2:  # of the same visitor, beside his session
            session = self.session(visitor, keeps=False)
            session.domain = origin.table.domain
        self.submit(session, Prompt(tokens, max(0, known)), count)

    @rule(
        visitor=WHO,
        number=st.integers(2, 4),
        said=SAID,
        count=COUNTS,
        replies=REPLIES,
        same=st.booleans(),
        known=st.booleans(),
    )
    def twins(
        self, visitor: int, number: int, said: list[int], count: int, replies: int, same: bool, known: bool
    ) -> None:
        """The same question several times at once, of one visitor or of several, some under a prompt of their own."""
        for i in range(number):
            session = self.session(visitor if same else visitor + i, keeps=False)
            prompt = Prompt((*self.system, *said), len(self.system) if known or i % 2 else 0)
            self.submit(session, prompt, count, replies if i < 2 else 1)

    @rule(rounds=st.integers(1, 20), said=TOKENS)
    def flood(self, rounds: int, said: int) -> None:
        """Small newcomers, one after the other, as long as it lasts."""
        for _ in range(rounds):
            self.submit(self.session(self.sessions, keeps=False), Prompt((said,)), 1)
            self.take_step()

    # -- who goes -------------------------------------------------------------------------------------------------

    @rule(who=WHO)
    def cancel(self, who: int) -> None:
        if sequence := self.pick(who, self.live()):
            self.stop(sequence)

    @rule(who=WHO)
    def end_search(self, who: int) -> None:
        """By the first of its beams, or by another one, wherever it is."""
        if beam := self.pick(who, [s for s in self.live() if s in self.searches]):
            self.stop(beam)

    @rule(masks=MASKS)
    def make_way(self, masks: list[int]) -> None:
        """Before each of some steps the device has no memory for some who run: bit i says it of the i-th.

        Then no more run for a while, as `Pace` has it.
        """
        scheduler = self.scheduler
        for mask in masks:
            for n, sequence in enumerate(list(scheduler.running)):
                if mask >> n & 1:
                    scheduler.preempt(sequence, "memory is full")
                    scheduler.max_sequences = max(1, len(scheduler.running) - 1)
            self.take_step()
        if not any(masks):
            scheduler.max_sequences = self.places

    @rule(who=WHO, which=st.sampled_from(["first", "another", "all"]))
    def regret(self, who: int, which: str) -> None:
        """Of several replies to a prompt the first one is stopped, another one, or all, wherever each of them is."""
        live = [s for s in self.live() if len(self.turns[s.id]) > 1]
        among = {"first": [s for s in live if not self.choice[s.id]], "another": [s for s in live if self.choice[s.id]]}
        if sequence := self.pick(who, among.get(which, live)):
            for other in live if which == "all" else [sequence]:
                if self.turns[other.id] is self.turns[sequence.id]:
                    self.stop(other)

    def stop(self, sequence: Sequence) -> None:
        """What it computed can be found by others, all of it."""
        if sequence in self.searches:
            self.searches.end(sequence, "abort")
            return
        computed, may_be_found = sequence.computed, sequence.table.is_findable
        self.scheduler.end(sequence, "abort")
        found = sum(length for _, length in sequence.table.matches(sequence.tokens[:computed]))
        assert found == computed or not may_be_found, f"of {computed} tokens only {found} can be found"
        self.check_rest(sequence, computed)
        self.end_again(sequence)

    def check_rest(self, sequence: Sequence, computed: int) -> None:
        """A session's table rests after its turn, if there is anything in it."""
        rests = sequence.session.keeps and computed > 0
        assert sequence.state == ("resting" if rests else "done")
        assert sequence.table.length == (computed if rests else 0)

    def end_again(self, sequence: Sequence) -> None:
        """The end comes once, however often it is called for."""
        seen = self.events.seq
        self.scheduler.end(sequence, "abort")
        assert self.scheduler.fail(sequence, "error") == []
        assert self.events.seq == seen

    @rule(who=WHO)
    def fail(self, who: int) -> None:
        """A turn fails between two steps; one beside which others rest, if there is one."""
        beside = [sequence for sequence in self.live() if sequence.session.resting]
        if sequence := self.pick(who, beside or self.live()):
            is_beam = sequence in self.searches
            self.model.spoil(sequence)
            self.fail_one(sequence)
            if not is_beam:
                self.end_again(sequence)

    def fail_one(self, sequence: Sequence) -> None:
        """Nothing that it held, the pinned blocks apart, may be found or held by anybody; so it is with all beams."""
        is_beam = sequence in self.searches
        turn = list(self.searches.beams(sequence)) if is_beam else [sequence]
        suspects = {block for s in turn for block in s.table.blocks} - self.pool.pinned
        others = {s.id: list(s.table.blocks) for s in self.scheduler.running if s not in turn}
        rested = {s.id: list(s.table.blocks) for s in self.rested() if not (is_beam and s.turn == sequence.turn)}
        served = sequence.session.served
        returned = self.searches.fail(sequence) if is_beam else self.scheduler.fail(sequence, "error")
        for block in suspects:
            assert self.pool.node[block] is None, f"block {block} of a failed turn can be found"
            assert self.pool.ref[block] == 0, f"block {block} of a failed turn is held"
        assert (sequence.state, list(sequence.table.blocks), sequence.session.served) == ("done", [], served)
        hit = {number for number, blocks in others.items() if suspects.intersection(blocks)}
        assert {s.id for s in returned} == hit, "not those are preempted who held one of its blocks"
        assert {s.id for s in self.scheduler.running} == set(others) - hit
        assert all(s.state == "preempted" and not s.table.blocks for s in returned)
        assert all(list(self.known[number].table.blocks) == others[number] for number in set(others) - hit)
        lost = {number for number, blocks in rested.items() if suspects.intersection(blocks)}
        assert {s.id for s in self.rested()} == set(rested) - lost, "not those were woken who held one of its blocks"

    def abort(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.end(sequence, "abort")

    def end(self, sequence: Sequence, reason: str) -> None:
        """A beam ends with all others."""
        if sequence in self.searches:
            self.searches.end(sequence, reason)
        else:
            self.scheduler.end(sequence, reason)

    @rule(visitor=WHO)
    def close(self, visitor: int) -> None:
        session = self.visitors[visitor % VISITORS]
        self.abort([sequence for sequence in self.live() if sequence.session is session])
        self.scheduler.wake(session, "the session was closed")
        assert not session.resting
        assert session.active == 0

    @rule(visitor=WHO, choice=st.integers(0, 4))
    def keep(self, visitor: int, choice: int) -> None:
        """One reply of the oldest turn is chosen. The others end, and what rests of them is released."""
        session = self.one_who_rests(visitor)
        live = [sequence for sequence in self.live() if sequence.session is session]
        turn = min((sequence.turn for sequence in (*live, *session.resting)), default=0)
        self.abort([s for s in live if s.turn == turn and self.choice[s.id] != choice])
        rested = session.resting[:]
        self.scheduler.keep(session, choice)
        assert session.resting == [last for last in rested if self.choice[last.id] == choice]
        gone = [last for last in rested if last not in session.resting]
        assert all((last.state, list(last.table.blocks)) == ("done", []) for last in gone)

    @rule(number=st.integers(1, VISITORS))
    def expire(self, number: int) -> None:
        """The tables that rest longest are given back; what is written in them stays findable."""
        for session in list(self.scheduler.resting)[:number]:
            rested = session.resting[:]
            assert rested
            self.scheduler.wake(session, "the session expired")
            assert not session.resting
            assert all((last.state, list(last.table.blocks)) == ("done", []) for last in rested)

    @rule(visitor=WHO, domain=st.sampled_from("abcd"), keeps=st.booleans())
    def change_domain(self, visitor: int, domain: str, keeps: bool) -> None:
        """Of a visitor between two turns; or he leaves, and another comes in his place."""
        session = self.visitors[visitor % VISITORS]
        if session.active:
            return
        if not keeps:
            self.close(visitor)
            session = self.visitors[visitor % VISITORS] = self.session(visitor)
        session.domain = domain

    # -- one step -------------------------------------------------------------------------------------------------

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.take_step()

    @rule(broken=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, -1]))
    def break_step(self, broken: int) -> None:
        """One row fails, several, or the whole step."""
        self.take_step(broken)

    @rule(fail_in=st.integers(1, 4), broken=st.sampled_from([0, 0, 0, 1, -1]))
    def starve_step(self, fail_in: int, broken: int) -> None:
        """An allocation of this step fails, wherever it is."""
        self.pool.fail_in = fail_in
        self.take_step(broken)
        self.pool.fail_in = 0

    @rule(who=WHO)
    def starve_one(self, who: int) -> None:
        """The next allocation fails for one that would be started, or for one that runs."""
        others = self.scheduler.preempted + self.scheduler.waiting
        if sequence := self.pick(who // 2, others if who % 2 else self.scheduler.running):
            self.pool.fail_for = sequence.id
            for _ in range(8):
                if self.pool.fail_for:
                    self.take_step()
            self.pool.fail_for = 0

    @rule()
    def stop_in_step(self) -> None:
        """All are ended after a step was launched and before it writes: what it writes is not found."""
        self.launch()
        self.abort(self.live())
        self.settle()

    @rule(who=WHO, more=st.integers(1, 5), is_genuine=st.booleans())
    def refuse(self, who: int, more: int, is_genuine: bool) -> None:
        """An allocation that fails leaves no trace."""
        if sequence := self.pick(who, self.scheduler.running):
            size = self.pool.block_size
            count = (self.pool.available + 1) * size if is_genuine else more * size
            before = deep_state(self.pool, self.known.values())
            self.pool.fail_in = 0 if is_genuine else 1
            with pytest.raises(PoolFull):
                sequence.table.append(count)
            assert deep_state(self.pool, self.known.values()) == before, "a failed allocation left a trace"

    def take_step(self, broken: int = 0) -> None:
        """Launch a step, and read the one that was in flight; or this one too."""
        step = self.launch(broken)
        if not self.overlaps or step.is_awaited:
            self.settle()
        self.all_is_well()

    def launch(self, broken: int = 0) -> Step:
        behind = self.flight
        scheduler, failed, before = self.scheduler, self.pool.failed, self.clerk.before(behind.step if behind else None)
        step = scheduler.schedule()
        self.clerk.count_admitted(before, step)
        for chunk in step.chunks:
            if chunk.sequence not in before.running:
                self.entered[chunk.sequence.id] = self.era
        self.check_step(step, before)
        if self.pool.failed == failed:
            self.clerk.check(before, step)
        else:
            self.cut.update(s.turn if s.candidates else s.id for s in step.exhausted)
            assert step.chunks or step.exhausted or step.preempted or step.lacks_room
        for sequence in step.exhausted:
            self.end(sequence, "length")
        following = self.model.launch(step, broken) if step.chunks else None
        self.lost_at_launch.update({id(chunk): self.lost[chunk.sequence.id] for chunk in step.chunks})
        self.settle(step.copies)
        self.flight = following
        return step

    def settle(self, copies: Collection[tuple[int, int]] = ()) -> None:
        """Read the step in flight. `copies` are those of the one that was launched meanwhile."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        for chunk in flight.step.chunks:
            has_lost = self.lost[chunk.sequence.id] > self.lost_at_launch.pop(id(chunk))
            assert chunk.is_wanted == (chunk.sequence.is_running and not has_lost), "dropped, or not"
        era = self.era
        counted = deliver(flight, self.scheduler, self.model, self.limits, self.fail_one, copies, self.searches.take)
        self.count_served(counted)
        for chunk in counted:
            if not chunk.sequence.is_running and not chunk.sequence.candidates:
                self.check_rest(chunk.sequence, chunk.sequence.computed)
            self.check_slots(chunk.sequence)
        if era == self.era:
            self.check_computed_once(counted)

    def check_step(self, step: Step, before: Before) -> None:
        assert sum(chunk.count for chunk in step.chunks) <= before.budget
        ids = [chunk.sequence.id for chunk in step.chunks]
        assert len(set(ids)) == len(ids), f"one sequence has two chunks in a step: {ids}"
        for chunk in step.chunks:
            sequence, length = chunk.sequence, before.length(chunk.sequence)
            assert chunk.count > 0
            assert sequence.is_running
            assert sequence not in before.beams, "goes on without the others"
            assert chunk.end <= length
            assert chunk.end < (sequence.limit or length + 1), "computes what comes after its last token"
            reaches_end = chunk.end == length
            assert chunk.draws == (reaches_end and sequence.draws)
            looks_back = sequence.params.penalizes or sequence.candidates
            assert not (before.pending(sequence) and looks_back), "draws without a look at what it drew"
            ahead = before.in_flight.get(sequence)
            start = sequence.computed + (ahead.count if ahead and ahead.stores else 0)
            assert chunk.start == start - (not chunk.stores), "tokens are left out, or run twice"
            assert chunk.stores or (chunk.count == 1 and reaches_end)
            is_prefill = sequence.generated == 0 and not reaches_end
            assert sequence.state == ("prefill" if is_prefill else "decode")

    # -- what was computed ----------------------------------------------------------------------------------------

    def check_slots(self, sequence: Sequence) -> None:
        """The slots of a sequence hold what it computed itself, or may share, and nothing that others wrote since."""
        if sequence.table.blocks:
            states = self.oracles[sequence.id].states(sequence.tokens[: sequence.computed])
            assert self.model.held(sequence) == states, f"sequence {sequence.id} would read what others wrote"

    def count_served(self, counted: list[Chunk]) -> None:
        for chunk in counted:
            if chunk.stores:
                self.served[chunk.sequence.session] += chunk.count
        for session, served in self.served.items():
            assert session.served == served, f"session {session.id} was served {served}, not {session.served}"

    def check_computed_once(self, counted: list[Chunk]) -> None:
        """A whole block of a prompt is computed by one of those who may share it, and found by the others.

        That holds for those who were started since a block was last lost.
        """
        size = self.pool.block_size
        for chunk in counted:
            sequence = chunk.sequence
            if not chunk.stores or self.entered[sequence.id] != self.era:
                continue
            last = min(chunk.end, sequence.prompt_length)
            for end in range(chunk.start // size * size + size, last + 1, size):
                key = (sequence.table.domain, sequence.system_tokens, tuple(sequence.tokens[:end]))
                assert key not in self.computed, f"{sequence.id} computes tokens {end - size} to {end} a second time"
                self.computed.add(key)

    # -- snapshots ------------------------------------------------------------------------------------------------

    @rule()
    def keep_snapshot(self) -> None:
        self.kept.append(deepcopy(self.view))

    @rule(which=WHO)
    def replay(self, which: int) -> None:
        """The events since any snapshot make it what is there now."""
        snapshot = deepcopy(self.kept[which % len(self.kept)])
        snapshot.apply_all(self.heard[snapshot.seq :])
        assert snapshot == self.view

    # -- after every operation ------------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        self.checked += 1
        self.pool.check(self.scheduler.tables())
        self.answers_are_right()
        self.everybody_is_where_his_state_says()
        self.clerk.check_forks()
        self.searches.check()
        self.replayed_events_give_the_state()

    def answers_are_right(self) -> None:
        for number, right in self.right.items():
            tokens, oracle = self.known[number].tokens, self.oracles[number]
            for at in range(right, len(tokens)):
                assert isinstance(oracle, Oracle)
                assert tokens[at] == oracle.next(tokens[:at]), f"token {at} of sequence {number} is wrong"
            self.right[number] = len(tokens)

    def everybody_is_where_his_state_says(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= self.places
        for queue in (scheduler.running, scheduler.preempted, scheduler.waiting):
            assert queue == sorted(queue, key=self.clerk.age), "not oldest first"
        chunks = self.flight.step.chunks if self.flight else []
        in_flight = {chunk.sequence: chunk for chunk in chunks if chunk.is_wanted}
        for s in scheduler.running:
            assert s.is_running
            ahead = in_flight.get(s)
            written = ahead.count if ahead and ahead.stores else 0
            assert s.computed + written == s.table.length <= len(s.tokens), "slots that nothing is written in"
            assert s.pending == (ahead is not None and ahead.draws)
            assert s.is_in_flight == (ahead is not None)
        assert all((s.state, list(s.table.blocks), s.computed) == ("preempted", [], 0) for s in scheduler.preempted)
        assert all((s.state, list(s.table.blocks)) == ("queued", []) for s in scheduler.waiting)
        rested_at = [session.rested_at for session in scheduler.resting]
        assert rested_at == sorted(rested_at), "not the longest rested first"
        for session in scheduler.resting:
            assert session.keeps
            assert session.rested_at
            assert session.resting
            assert all(sequence.state == "resting" for sequence in session.resting)
        live = Counter(s.session for s in self.live())
        for session in self.visitors:
            assert session.active == live[session]
            assert bool(session.resting) == (session in scheduler.resting)
            assert len({sequence.turn for sequence in session.resting}) <= 1, "what rests is of several turns"
            running = {sequence.turn for sequence in scheduler.running if sequence.session is session}
            rested = {sequence.turn for sequence in session.resting}
            assert rested <= running or not running, "the last turn's table rests although the next one runs"

    def replayed_events_give_the_state(self) -> None:
        view, pool = self.view, self.pool
        states = [FREE] * (pool.num_blocks + 1)
        for block in range(1, pool.num_blocks + 1):
            used = pool.ref[block] or block in pool.pinned
            states[block] = USED if used else IDLE if pool.node[block] else FREE
        assert (list(view.ref), list(view.fill), list(view.state)) == (pool.ref, pool.fill, states)
        there = {s.id: s for s in (*self.live(), *self.rested())}
        shown = {
            s.id: (s.state, s.table, s.tokens) for session in view.sessions.values() for s in session.sequences.values()
        }
        assert shown == {number: (s.state, list(s.table.blocks), s.table.length) for number, s in there.items()}
        assert view.sessions.keys() == {s.session.id for s in there.values()}

    # -- the end --------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.finish()

    def finish(self) -> None:
        """Left to itself, everybody comes to an end; then only what can be found or is pinned is left."""
        self.settle()  # somebody may be broken in it
        live = self.live()
        most = 2 * sum(self.limits[s.id] for s in live) * len(live) + 1
        while self.scheduler.has_work or self.flight:
            assert most, "it goes on for ever"
            most -= 1
            self.take_step()
        for sequence in live:
            if sequence.candidates:
                self.searches.check_end(sequence, self.cut)
                continue
            is_too_long = not self.clerk.fits(len(sequence.tokens), sequence.system_tokens)
            assert is_too_long or sequence.id in self.cut or len(sequence.tokens) == self.limits[sequence.id]
        for session in list(self.scheduler.resting):
            self.scheduler.wake(session, "closed")
        self.pool.check([])
        assert self.pool.available == self.pool.num_blocks - len(self.pool.pinned)
        assert self.view.sessions == {}


# -- the same without Hypothesis: it cannot make a failure small, but walks several times as far in the same time ------


def walk(seed: int, steps: int = 60, counts: Counter[str] | None = None) -> int:
    """A random walk of the machine, checked after every step; the seed is all that makes it. Those of even seeds
    have a step in flight while the next one is scheduled; in four of seven, visitors also search.

    Args:
        counts: how often each rule ran is added to it.

    Returns:
        How many operations were checked.
    """
    random = Random(seed)
    counts = Counter() if counts is None else counts

    def said(least: int = 1, most: int = 9) -> list[int]:
        return random.choices(range(ALPHABET), [3, 1, 1], k=random.randint(least, most))

    def flip() -> bool:
        return random.random() < 0.5

    def replies() -> int:
        return random.choice([1, 1, 1, 2, 3, 5])

    def masks() -> list[int]:
        often = random.choice([0, 0, 0.2, 0.5])
        steps = random.choice([0, 1, 2, 4, 16])
        return [random.randrange(4096) & random.randrange(4096) * (random.random() < often) for _ in range(steps)]

    machine = SchedulerMachine()
    searches = seed % 7 > 2
    sizes = random.randint(4, 12 + 12 * searches), random.randint(1, 4)
    machine.start(*sizes, random.randint(1, 6 + 6 * searches), random.randint(1, 12), said(0), flip(), seed % 2 == 0)
    rules: dict[str, Callable[[int], Any]] = {
        "arrive": lambda who: machine.arrive(who, flip(), flip(), said(), random.randint(1, 8)),
        "reply": lambda who: machine.reply(
            who,
            flip(),
            said(),
            random.randint(1, 8),
            random.randint(2, 5),
            random.choice([0, 1, 2, 4, 20, 20]),
            random.choice([None, None, 0, 1, 2]),
        ),
        "go_on": lambda who: machine.go_on(who, said(), random.randint(1, 8), replies(), random.random() < 0.2, flip()),
        "fork": lambda who: machine.fork(
            who, random.randint(0, 15), random.randint(0, 12), said(0), random.randint(1, 8)
        ),
        "twins": lambda who: machine.twins(
            who, random.randint(2, 4), said(), random.randint(1, 8), replies(), flip(), flip()
        ),
        "flood": lambda who: machine.flood(random.randint(1, 20), who % ALPHABET),
        "cancel": lambda who: machine.cancel(who),
        "regret": lambda who: machine.regret(who, random.choice(["first", "another", "all"])),
        "keep": lambda who: machine.keep(who, random.randint(0, 4)),
        "fail": lambda who: machine.fail(who),
        "close": lambda who: machine.close(who),
        "expire": lambda who: machine.expire(who % VISITORS + 1),
        "change_domain": lambda who: machine.change_domain(who, random.choice("abcd"), flip()),
        "step": lambda who: machine.step(who % 12 + 1),
        "break_step": lambda who: machine.break_step(random.choice([1, 2, 3, 4, 5, 6, 7, 8, -1])),
        "starve_step": lambda who: machine.starve_step(random.randint(1, 4), random.choice([0, 0, 0, 1, -1])),
        "starve_one": lambda who: machine.starve_one(who),
        "stop_in_step": lambda _: machine.stop_in_step(),
        "refuse": lambda who: machine.refuse(who, random.randint(1, 5), flip()),
        "keep_snapshot": lambda _: machine.keep_snapshot(),
        "replay": lambda who: machine.replay(who),
    }
    if searches:
        rules |= {
            "search": lambda who: machine.search(
                who,
                flip(),
                said(),
                random.randint(1, 8),
                Beams(5, random.choice(PENALTIES), random.choice(STOPPING), random.randint(1, 5)),
                random.randint(1, 5),
                random.choice([1, 1, 2, 3]),
                masks(),
                random.choice([None, None, 0, 1, 2]),
            ),
            "end_search": lambda who: machine.end_search(who),
            "make_way": lambda _: machine.make_way(masks()),
        }
    favours = [random.random() ** 2 for _ in rules]  # each walk likes some rules better than others
    if searches:
        names, crowd = list(rules), 10 if seed % 7 == 6 else 1  # in some walks there is hardly anything but searches
        favours[names.index("search")] *= 4 * crowd
        favours[names.index("make_way")] *= 2 * crowd
    for name in random.choices(list(rules), favours, k=steps):
        rules[name](random.randrange(16))
        machine.all_is_well()
        counts[f"schedule {name}"] += 1
    machine.finish()
    return machine.checked
