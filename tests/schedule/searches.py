"""Beam searches on their way through the scheduler, beside the same searches without one.

A search alone (`Alone`) is a `BeamSearch` and tokens: no sequences, no steps, no pool. Whatever becomes of the beams on
their way, they and their answers must be the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

from chatpage.schedule.beam import Beam, Beams, BeamSearch, Finished
from chatpage.schedule.group import BeamGroup
from chatpage.schedule.scheduler import Scheduler
from chatpage.schedule.sequence import Sequence
from tests.schedule.fake import ENDS, Candidates, FakeModel, likeliest, state

Tokens = tuple[int, ...]


class Watched(Scheduler):
    """Says which beams it makes, before they do anything.

    Attributes:
        on_branch: is told (parent, child).
    """

    on_branch: Callable[[Sequence, Sequence], None]

    def branch(self, parent: Sequence) -> Sequence:
        child = super().branch(parent)
        self.on_branch(parent, child)
        return child


@dataclass(frozen=True)
class Moment:
    """What a search has, when its live beams have so many tokens; and what it would answer if it were cut off then."""

    live: list[Beam]
    finished: list[Finished]
    best: list[Finished]


class Alone:
    """A search without any scheduler, as far as it was asked for; and what the slots of its beams hold."""

    def __init__(self, prompt: Tokens, wish: Beams, most: int) -> None:
        self._prompt = prompt
        self._search = BeamSearch(wish, stop_token_ids=ENDS, max_tokens=most)
        self._moments = [self._moment()]
        states: list[int] = []
        for token in prompt:
            states.append(state(states, token))
        self._states: dict[Tokens, list[int]] = {(): states}  # by what was generated

    def _moment(self) -> Moment:
        return Moment(self._search.live, self._search.finished, self._search.best)

    def moment(self, length: int) -> Moment:
        while len(self._moments) <= length:
            last = [self.states((*self._prompt, *beam.tokens))[-1] for beam in self._search.live]
            self._search.advance([likeliest(state, self._search.candidates) for state in last])
            self._moments.append(self._moment())
        return self._moments[length]

    def states(self, tokens: list[int] | Tokens) -> list[int]:
        """What the slots of a beam hold that has these tokens, or of a head of it."""
        generated = tuple(tokens[len(self._prompt) :])
        if generated not in self._states:
            before = self.states(tokens[:-1])
            self._states[generated] = [*before, state(before, generated[-1])]
        return self._states[generated][: len(tokens)]


@dataclass
class Search:
    """A search that is on its way.

    Attributes:
        forks: how many of its beams were forked from others.
    """

    first: Sequence
    group: BeamGroup
    alone: Alone
    forks: int = 0

    @property
    def moment(self) -> Moment:
        return self.alone.moment(self.group.search.length)

    def of(self, beam: Sequence) -> Tokens:
        """What a beam has generated."""
        return tuple(beam.tokens[self.first.prompt_length :])

    def rested(self) -> dict[Tokens, Sequence]:
        """Those of its finished beams whose tables rest."""
        return {self.of(beam): beam for beam in self.first.session.resting if beam.turn == self.first.id}


class Searches:
    """All searches on their way. They do what they are told, and are looked at before and after.

    Attributes:
        reasons: why those that are over ended, by the id of their first sequence: "over" is their own end.
        choice: which answer each beam is that rests.
    """

    def __init__(self, scheduler: Scheduler, model: FakeModel, choice: dict[int, int]) -> None:
        self.scheduler, self.model, self.choice = scheduler, model, choice
        self._most = scheduler.max_sequences  # it may be less for a while
        self.reasons: dict[int, str] = {}
        self._searches: dict[Sequence, Search] = {}  # by live beam

    def begin(self, first: Sequence, wish: Beams, most: int) -> Alone:
        """A search of which that sequence, just submitted, is the prompt, for at most so many tokens."""
        search = BeamSearch(wish, stop_token_ids=ENDS, max_tokens=most)
        alone = Alone(tuple(first.tokens), wish, most)
        self._searches[first] = Search(first, BeamGroup(self.scheduler, search, first), alone)
        return alone

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._searches

    def beams(self, beam: Sequence) -> list[Sequence]:
        """All live beams of the same search."""
        return self._searches[beam].group.live

    def branched(self, parent: Sequence, child: Sequence) -> None:
        """Both have the same, and nothing of it twice."""
        for same in ("session", "tokens", "prompt_length", "computed", "cached", "system_tokens", "params", "seed"):
            assert getattr(child, same) == getattr(parent, same), f"a beam with another {same}"
        for same in ("turn", "width", "candidates", "looks_back", "limit", "state", "choice", "pending"):
            assert getattr(child, same) == getattr(parent, same), f"a beam with another {same}"
        assert child.table.blocks == parent.table.blocks, "a fork takes a block, or leaves one out"
        assert child.table.length == parent.table.length == child.computed
        assert child.origin is None
        search = self._searches[child] = self._searches[parent]
        search.forks += 1

    # -- what it is told ------------------------------------------------------------------------------------------

    def take(self, beam: Sequence, candidates: Candidates) -> None:
        """Of a session that keeps, what has just finished rests, and what is not among the best any more does not."""
        search = self._searches[beam]
        group, rested, before, length = search.group, search.rested(), search.moment, search.group.search.length
        forks = search.forks
        waiting = [other for other in group.live if other is not beam and other.waits]
        live = list(group.live)
        has_moved = len(waiting) == len(live) - 1
        assert group.take(beam, candidates) == has_moved, "says that all have moved on, or that they have not"
        assert group.search.length == length + has_moved, "goes on without the others, or waits in vain"
        moment = search.moment
        kept = {tokens for tokens, _ in (moment.finished if moment.live else moment.best)}
        new = kept - {tokens for tokens, _ in before.finished} if search.first.session.keeps else set[Tokens]()
        self._check_rest(search, (rested.keys() & kept if has_moved else rested.keys()) | new)
        self._part(search, live)
        if has_moved:
            heirs = new.union(beam.tokens for beam in moment.live)
            parents = {tokens[:-1] for tokens in heirs}
            assert search.forks - forks == len(heirs) - len(parents), "forks for nothing"
        if not group.live:
            assert group.search.is_over
            assert group.end("stop") == moment.best, "another answer than it finds alone"
            self._leave(search, "over")

    def end(self, beam: Sequence, reason: str) -> None:
        """It is cut off, and what it has then is its answer. What it computed can be found, whole blocks at least."""
        search = self._searches[beam]
        live, moment, keeps = list(search.group.live), search.moment, search.first.session.keeps
        has = {search.of(beam): beam.computed for beam in live if keeps and beam.computed}
        wanted = (search.rested().keys() | has.keys()) & {tokens for tokens, _ in moment.best}
        size = self.scheduler.pool.block_size
        computed = [(other, other.computed // size * size) for other in live if other.table.is_findable]
        assert search.group.end(reason) == moment.best, "another answer than it has alone"
        for other, count in computed:
            found = sum(length for _, length in other.table.matches(other.tokens[:count]))
            assert found == count, f"of {count} tokens only {found} can be found"
        self._check_rest(search, wanted)
        assert all(beam.table.length == has.get(tokens, beam.computed) for tokens, beam in search.rested().items())
        self._part(search, live)
        self._leave(search, reason)

    def fail(self, beam: Sequence) -> list[Sequence]:
        """Nothing of it is left. Returns who was preempted for that."""
        search = self._searches[beam]
        live = list(search.group.live)
        preempted = search.group.fail("error")
        assert not set(preempted) & set(live)
        assert not search.rested(), "a table rests of a search that failed"
        self._part(search, live)
        self._leave(search, "error")
        return preempted

    def _check_rest(self, search: Search, wanted: set[Tokens]) -> None:
        rested = search.rested()
        assert rested.keys() == wanted, "not those rest that finished and are among the best"
        for tokens, beam in rested.items():
            self._check_slots(search, beam)
            assert beam.computed == beam.table.length >= len(beam.tokens) - 1 or not search.group.live
            assert beam.state == "resting", f"{tokens} are {beam.state}"

    def _part(self, search: Search, before: list[Sequence]) -> None:
        """Those that are not among the live ones any more have ended."""
        for beam in before:
            if beam not in search.group.live:
                assert beam.state in ("resting", "done"), "a beam is forgotten"
                assert beam.state == "resting" or not beam.table.blocks
        self._forget(search)
        self._searches.update(dict.fromkeys(search.group.live, search))

    def _forget(self, search: Search) -> None:
        for beam in [beam for beam, its in self._searches.items() if its is search]:
            del self._searches[beam]

    def _leave(self, search: Search, reason: str) -> None:
        """The best is the first choice of those that rest; and nothing of it is queued any more."""
        scheduler, choices = self.scheduler, {tokens: n for n, (tokens, _) in enumerate(search.moment.best)}
        assert not search.group.live
        for tokens, beam in search.rested().items():
            assert beam.choice == choices[tokens]
            self.choice[beam.id] = choices[tokens]
        queued = (*scheduler.running, *scheduler.preempted, *scheduler.waiting)
        assert all(s.turn != search.first.id for s in queued), "a beam is left of a search that is over"
        self._forget(search)
        self.reasons[search.first.id] = reason

    def check_end(self, beam: Sequence, cut: set[int]) -> None:
        """Left to itself, it has come to its end, or the pool could not hold it, or an allocation was made to fail."""
        reason = self.reasons[beam.turn]
        assert reason == "over" or (reason == "length" or beam.turn in cut), f"a search ended for {reason}"

    # -- after every operation ------------------------------------------------------------------------------------

    def check(self) -> None:
        scheduler = self.scheduler
        there = [s for s in (*scheduler.running, *scheduler.preempted, *scheduler.waiting) if s.candidates]
        assert set(there) == self._searches.keys(), "beams that nobody has, or has not any more"
        for search in {search.first: search for search in self._searches.values()}.values():
            self._check(search)
        places = {s.turn: s.width for s in (*scheduler.running, *scheduler.preempted)}
        others = sum(s.width == 1 for s in (*scheduler.running, *scheduler.preempted))
        beams = sum(width for width in places.values() if width > 1)
        assert others + beams <= self._most, "more have places than there are"

    def _check(self, search: Search) -> None:
        live, moment = search.group.live, search.moment
        assert [search.of(beam) for beam in live] == [beam.tokens for beam in moment.live], "not the beams it has alone"
        assert search.group.search.finished == moment.finished
        assert len(set(live)) == len(live) <= search.first.width
        assert not all(beam.waits for beam in live), "they wait for nobody"
        for beam in live:
            assert not beam.waits or (beam.is_running and beam.computed == len(beam.tokens)), "waits too early"
            self._check_slots(search, beam)
        rested = search.rested()
        assert rested.keys() <= {tokens for tokens, _ in moment.finished}, "rests although better ones have finished"
        for beam in rested.values():
            self._check_slots(search, beam)

    def _check_slots(self, search: Search, beam: Sequence) -> None:
        states = search.alone.states(beam.tokens)[: beam.computed]
        assert self.model.held(beam) == states, f"beam {beam.id} would read what others wrote"
