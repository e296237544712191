"""Who runs and who is started in a step, worked out anew from the rules; the scheduler must have come to the same."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chatpage.cache.prefix import common_length
from chatpage.schedule.scheduler import PATIENCE, Chunk, Scheduler, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session


@dataclass
class Before:
    """What a step has to start from."""

    running: list[Sequence]
    preempted: list[Sequence]
    waiting: list[Sequence]
    resting: dict[Session, list[Sequence]]
    held_back: set[Sequence]  # until somebody has computed a block
    in_flight: dict[Sequence, Chunk]  # what is computed for it, and not read back yet
    era: int
    admitted: int  # new ones, so far
    budget: int  # tokens
    copying: set[Sequence]  # whose next token needs a copy of the block that it goes into
    beams: set[Sequence]  # those that wait for others of their search
    stuck: Sequence | None  # who is to come back, while all who run wait for others, and has no room

    def pending(self, sequence: Sequence) -> int:
        """How many tokens it will have which nobody knows yet."""
        return sequence in self.in_flight and self.in_flight[sequence].draws

    def length(self, sequence: Sequence) -> int:
        return len(sequence.tokens) + self.pending(sequence)

    def sits_out(self, sequence: Sequence) -> bool:
        """Whether its last token is on its way, or one before a copy."""
        return bool(self.pending(sequence)) and (self.length(sequence) == sequence.limit or sequence in self.copying)


class Clerk:
    """Looks over the scheduler's shoulder.

    Args:
        era: a number that grows when a block is lost that somebody might have found.
        admitted: how many new ones were started, so far.
    """

    def __init__(self, scheduler: Scheduler, era: Callable[[], int], admitted: int) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self.era = era
        self.admitted = admitted
        self._cached: dict[Sequence, int | None] = {}
        self._ahead: dict[Sequence, int] = {}  # how many waited when it came, itself included
        self._overtaken: Counter[Sequence] = Counter()  # how many new ones were started when it might have been
        self._first: dict[Sequence, Sequence] = {}  # of each reply, the first one to the same prompt
        # Replies that forked one table and have it still, with the one whose it was; by that, and how often it lost it.
        self._forks: dict[tuple[Sequence, int], list[Sequence]] = {}
        self._lost: Counter[Sequence] = Counter()
        self._parted: set[Sequence] = set()  # those with a slot behind their prompt
        self._copied: dict[Sequence, tuple[int, int]] = {}  # since it was looked how things are

    def branches(self, parent: Sequence, child: Sequence) -> None:
        """A search has another beam, which is as old as the search."""
        self._first[child], self._cached[child] = self._first[parent], self._cached[parent]

    def age(self, sequence: Sequence) -> tuple[int, int]:
        return self._first[sequence].id, sequence.id

    # -- what is heard --------------------------------------------------------------------------------------------

    def comes(self, sequence: Sequence, first: Sequence) -> None:
        assert self.scheduler.waiting[-1] is sequence
        self._ahead[sequence] = len(self.scheduler.waiting)
        self._first[sequence] = first

    def forks(self, sequence: Sequence, parent: Sequence, at: int) -> None:
        """A reply gets the table of the first one, which takes no block, but its first write may take one."""
        assert (parent, at) == (self._first[sequence], sequence.prompt_length), "forks another table, or elsewhere"
        assert (sequence.state, sequence.table.length) == ("queued", 0)
        assert self.pool.available or self.scheduler.resting, "forks although the pool is full"
        self._forks.setdefault((parent, self._lost[parent]), [parent]).append(sequence)

    def has_slots(self, sequence: Sequence, end: int) -> None:
        if end > sequence.prompt_length:
            self._parted.add(sequence)

    def copies(self, sequence: Sequence, source: int, target: int) -> None:
        self._copied[sequence] = (source, target)

    def loses(self, sequence: Sequence) -> None:
        """It is preempted. What it is given later is its own."""
        self._lost[sequence] += 1
        self._parted.discard(sequence)
        for family in self._forks.values():
            if sequence in family:
                family.remove(sequence)

    def check_forks(self) -> None:
        """They hold the whole blocks of their prompt in common; the rest of it too, until they write behind it."""
        for family in self._forks.values():
            there = [sequence for sequence in family if sequence.table.length]
            if len(there) > 1:
                self._check_family(there)

    def _check_family(self, family: list[Sequence]) -> None:
        size = self.pool.block_size
        whole, tail = divmod(family[0].prompt_length, size)
        assert len({tuple(sequence.table.blocks[:whole]) for sequence in family}) == 1, "a prompt is there twice"
        parted = [sequence for sequence in family if sequence in self._parted]
        own = sum(len(sequence.table.blocks) - whole for sequence in parted)
        common = bool(tail) and len(parted) < len(family)  # the others still have the prompt's last block in common
        used = len(set().union(*(sequence.table.blocks for sequence in family))) - whole
        # One that parted may have done so in that very block.
        assert used - own == common or (parted and used == own), f"{used} blocks where {own + common} will do"

    def before(self, flight: Step | None) -> Before:
        """How things are before a step, while that one is in flight."""
        scheduler = self.scheduler
        self._copied.clear()
        return Before(
            list(scheduler.running),
            list(scheduler.preempted),
            list(scheduler.waiting),
            {session: list(session.resting) for session in scheduler.resting},
            {s for s in (*scheduler.preempted, *scheduler.waiting) if s.awaits is not None},
            {chunk.sequence: chunk for chunk in flight.chunks if chunk.is_wanted} if flight else {},
            self.era(),
            self.admitted,
            self._budget(),
            {sequence for sequence in scheduler.running if self._copies(sequence)},
            {sequence for sequence in scheduler.running if sequence.waits},
            self._stuck(),
        )

    def _stuck(self) -> Sequence | None:
        scheduler = self.scheduler
        first = next(iter(scheduler.preempted), None)
        waits = bool(scheduler.running) and all(sequence.waits for sequence in scheduler.running)
        return first if first and waits and not self._fits(first) else None

    def _copies(self, sequence: Sequence) -> bool:
        table, pool = sequence.table, self.pool
        if table.length % pool.block_size == 0 or not pool.needs_copy(table.blocks[-1]):
            return False
        others = pool.ref[table.blocks[-1]] > 1 or table.blocks[-1] in pool.pinned
        return others or pool.available > 0

    def _budget(self) -> int:
        """All that is allowed; half of it while somebody decodes, or twice what all decodes take."""
        most, decodes = self.scheduler.max_step_tokens, [s for s in self.scheduler.running if s.state == "decode"]
        return sorted([most // 2, 2 * len(decodes), most])[1] if decodes else most

    def count_admitted(self, before: Before, step: Step) -> None:
        """New ones are counted, and each remembers from then on how much it found."""
        new = [sequence for sequence in before.waiting if sequence not in self.scheduler.waiting]
        self.admitted += len(new)
        found = {chunk.sequence: chunk.start + (not chunk.stores) for chunk in step.chunks}
        self._cached.update({sequence: found.get(sequence, sequence.cached) for sequence in new})
        assert all(sequence.cached == self._cached.get(sequence) for sequence in (*before.waiting, *found))

    # -- a step's checks ------------------------------------------------------------------------------------------

    def check(self, before: Before, step: Step) -> None:
        """Of a step in which no allocation was made to fail."""
        chosen = [chunk.sequence for chunk in step.chunks]
        for sequence in step.exhausted:
            assert sequence not in before.in_flight, "ended although a token of it is still to come"
        had_work = bool(before.running or before.preempted or before.waiting)
        may_rest = step.lacks_room or any(self._sits_out(before, sequence) for sequence in before.running)
        may_rest = may_rest or bool(before.beams and step.preempted)  # the oldest may be one that waits
        assert bool(chosen or step.exhausted) == had_work or may_rest, "an empty step although there is work"
        for sequence in step.exhausted:
            assert not self._fits_with_its_search(sequence), "ended although it fits"
            assert sequence not in step.preempted, "lost its blocks although nobody else needs them"
            others = [s for s in before.running if self._first[s] is not self._first[sequence]]
            assert set(others) <= set(step.preempted), "ended although others run"
        assert step.copies == list(self._copied.values()), "not the copies that were asked for"
        assert not self._copied.keys() & before.in_flight.keys(), "a block is replaced that a step in flight uses"
        self._check_running(before, step)
        self._check_started(before, step)

    def fits(self, tokens: int, system_tokens: int) -> bool:
        """Whether a sequence of that length could be in the pool if nobody else were."""
        size = self.pool.block_size
        return -(-tokens // size) - system_tokens // size <= self.pool.num_blocks - len(self.pool.pinned)

    def _fits_with_its_search(self, sequence: Sequence) -> bool:
        """Whether the pool could hold it, and if it is a beam, all of them, each with an end of its own.

        If what others need can be found: the same tokens may be there twice, where some had left the content tree, or
        had been in an idle block too.
        """
        if not sequence.candidates:
            return self.fits(len(sequence.tokens), sequence.system_tokens)
        scheduler, size = self.scheduler, self.pool.block_size
        if not all(other.table.is_findable for other in scheduler.running):
            return False
        beams = [s for s in (*scheduler.running, *scheduler.preempted) if self._first[s] is self._first[sequence]]
        whole = {content for beam in beams for content in self._whole(beam, len(beam.tokens))}
        there = [(beam, self._whole(beam, beam.table.length)) for beam in beams]
        at = sequence.system_tokens // size
        blocks = {block for beam, its in there for block in beam.table.blocks[at : at + len(its)]}
        twice = len(blocks) - len({content for _, its in there for content in its})
        ends = sum(len(beam.tokens) % size > 0 for beam in beams)
        return len(whole) + ends + twice <= self.pool.num_blocks - len(self.pool.pinned)

    def _whole(self, beam: Sequence, length: int) -> list[tuple[int, ...]]:
        """What is in its whole blocks after the system prompt's, each with all that comes before."""
        size = self.pool.block_size
        start = beam.system_tokens // size * size + size
        return [tuple(beam.tokens[:end]) for end in range(start, length + 1, size)]

    def _check_running(self, before: Before, step: Step) -> None:
        """All who run are in the step, oldest first, but for the newest, whose blocks others need."""
        chosen = [chunk.sequence for chunk in step.chunks if chunk.sequence in before.running]
        for sequence in chosen:
            assert not (before.pending(sequence) and before.length(sequence) == sequence.limit), "after its last token"
        idle = {s for s in before.running if s not in chosen and self._idles(before, s)}
        gone = {*step.preempted, *step.exhausted, *idle}
        kept = [s for s in before.running if s not in gone]
        assert chosen == kept[: len(chosen)], "not the oldest first"
        assert chosen or not kept or step.lacks_room, "the oldest makes no progress"
        if step.lacks_room:
            self._check_lack(before, step, kept[len(chosen)])
        elif chosen != kept:
            assert sum(c.count for c in step.chunks) == before.budget, "left out without a reason"
        for victim in step.preempted:
            assert victim in before.running
            assert victim not in before.in_flight, "loses blocks that a step in flight writes"
            assert all(self.age(s) < self.age(victim) for s in chosen), "an older one is preempted for a newer one"
        assert not (step.preempted and self.scheduler.resting) or before.stuck, "preempted while tables rest"
        started = {chunk.sequence.session: chunk.sequence for chunk in step.chunks}
        left = list(self.scheduler.resting)
        others = [session for session, last in before.resting.items() if not self._follows(started.get(session), last)]
        assert left == others[len(others) - len(left) :], "not the longest rested first"

    def _idles(self, before: Before, sequence: Sequence) -> bool:
        """Whether it has nothing to do, as it waits for other beams or for its last token."""
        return sequence in before.beams or self._sits_out(before, sequence)

    def _sits_out(self, before: Before, sequence: Sequence) -> bool:
        """Whether that is so at first or by the time when it had its turn."""
        return before.sits_out(sequence) or (bool(before.pending(sequence)) and self._copies(sequence))

    def _follows(self, sequence: Sequence | None, last: list[Sequence]) -> bool:
        """Whether it is of a turn after that one."""
        return sequence is not None and self._first[sequence] is not self._first[last[0]]

    def _check_lack(self, before: Before, step: Step, sequence: Sequence) -> None:
        """The step in flight is to be read back first, as this one has no room, and somebody there might end."""
        table, size = sequence.table, self.pool.block_size
        left = before.budget - sum(chunk.count for chunk in step.chunks)
        end = min(before.length(sequence), table.length + left)
        copies = table.length % size != 0 and self.pool.needs_copy(table.blocks[-1])
        needed = -(-end // size) - len(table.blocks) + copies
        assert needed > self.pool.available, "waits for room although there is some"
        chosen = {chunk.sequence for chunk in step.chunks}
        newest = next(s for s in reversed(self.scheduler.running) if s not in chosen)
        assert newest in before.in_flight, "waits for a step in flight although another one could make room"

    def _check_started(self, before: Before, step: Step) -> None:
        """Who was started, in which order, and why nobody else."""
        started = [chunk for chunk in step.chunks if chunk.sequence not in before.running]
        if before.stuck:
            self._check_way(before, before.stuck, step)
            return
        if step.preempted or step.lacks_room:
            assert not started, "somebody starts in a step in which somebody lost his blocks, or lacks some"
            return
        new = [chunk.sequence for chunk in started if chunk.sequence in before.waiting]
        assert not (new and self.scheduler.preempted), "a new one before all that were preempted are back"
        self._follow(before, step, started)
        self._check_replies([chunk for chunk in started if chunk.sequence in new])
        self._check_patience(new)

    def _check_way(self, before: Before, stuck: Sequence, step: Step) -> None:
        """The newest other search makes way for one that all wait for; if there is none, that one can only end."""
        others = [s for s in before.running if self._first[s] is not self._first[stuck]]
        newest = [s for s in others if self._first[s] is self._first[others[-1]]]
        assert not step.chunks, "somebody takes what one needs whom others wait for"
        assert step.preempted == newest, "not the newest search makes way"
        assert step.exhausted == ([] if others else [stuck]), "not the one ends that will never fit"

    def _follow(self, before: Before, step: Step, started: list[Chunk]) -> None:
        """Go through the candidates in their order: each was started, or there is a reason why not."""
        left = list(started)
        there = [self._first[s] for s in before.running if s.width > 1]
        places = self.scheduler.max_sequences - sum(s.width == 1 for s in before.running)
        places -= sum(first.width for first in set(there))
        budget = before.budget - sum(c.count for c in step.chunks if c not in started)
        admitted = [before.admitted]
        for candidate in self._in_order(before, admitted):
            taken = 0 if self._first[candidate] in there else candidate.width  # a search has places for all its beams
            computes = left != started or any(s not in before.beams for s in before.running)  # somebody does
            if not budget or (taken > max(places, 0) and computes):
                break
            places -= taken
            if left and left[0].sequence is candidate:
                there += [self._first[candidate]] if candidate.width > 1 else []
                budget -= left.pop(0).count
                admitted[0] += candidate in before.waiting
            elif self._awaits_prompt(candidate):
                continue
            elif not self._may_fork(candidate) and self._waits(candidate, before):
                if not left and not self._fits(candidate):
                    break  # either may have kept it back, so those behind it may be kept back too
            else:
                assert not self._fits(candidate), f"{candidate.id} is not started, and nothing is in its way"
                break
        assert not left, f"{[chunk.sequence.id for chunk in left]} started out of turn"

    def _check_replies(self, new: list[Chunk]) -> None:
        """A reply forks the first one's table once the prompt is there, unless that one has ended before."""
        for chunk in new:
            sequence, first = chunk.sequence, self._first[chunk.sequence]
            assert not self._awaits_prompt(sequence), "a reply starts before its prompt is computed"
            assert self._may_fork(sequence) == (sequence in self._forks.get((first, self._lost[first]), [])[1:])
            if self._may_fork(sequence):
                length = sequence.prompt_length
                assert (chunk.start, chunk.count, chunk.stores) == (length - 1, 1, False)
                blocks = list(first.table.blocks[: -(-length // self.pool.block_size)])
                assert list(sequence.table.blocks) == blocks, "a fork takes a block, or leaves one out"

    def _awaits_prompt(self, sequence: Sequence) -> bool:
        """Whether the first reply has still to compute what this new one is to fork."""
        scheduler, first = self.scheduler, self._first[sequence]
        is_there = first in (*scheduler.running, *scheduler.preempted, *scheduler.waiting)
        return self._is_to_fork(sequence) and is_there and first.computed < sequence.prompt_length

    def _may_fork(self, sequence: Sequence) -> bool:
        """Whether a new reply has only to fork the first one's table."""
        first = self._first[sequence]
        is_there = first in self.scheduler.running and first.computed >= sequence.prompt_length
        return self._is_to_fork(sequence) and is_there

    def _is_to_fork(self, sequence: Sequence) -> bool:
        """Whether it is a new one, but not the first."""
        return self._first[sequence] is not sequence and not sequence.generated and not self._lost[sequence]

    def _in_order(self, before: Before, admitted: list[int]) -> Iterator[Sequence]:
        """The preempted ones by arrival; then new ones by what was served, every eighth by arrival."""
        yield from before.preempted
        if self.scheduler.preempted:
            return
        left = list(before.waiting)
        while left:
            by_arrival = admitted[0] % PATIENCE == PATIENCE - 1
            chosen = min(left, key=lambda s: s.id if by_arrival else (s.session.served, s.id))
            left.remove(chosen)
            yield chosen

    def _waits(self, sequence: Sequence, before: Before | None = None) -> bool:
        """Whether somebody who runs computes a whole block that it needs too, and could find.

        That is the block after what is found; where it waited before, or a block was lost in this step, it may have
        been another one.
        """
        size = self.pool.block_size
        found = sum(length for _, length in sequence.table.matches(sequence.tokens))
        end = found // size * size + size
        is_sure = before and sequence not in before.held_back and before.era == self.era()
        for other in self.scheduler.running:
            if (other.table.domain, other.system_tokens) != (sequence.table.domain, sequence.system_tokens):
                continue
            common = common_length(other.tokens, sequence.tokens) // size * size
            is_next = other.computed < end <= common and other.table.is_findable
            if is_next or (other.computed < common and not is_sure):
                return True
        return False

    def _fits(self, sequence: Sequence) -> bool:
        """Whether its first chunk has room beside all who run, if no table rested."""
        pool, size = self.pool, self.pool.block_size
        held = pool.pinned.union(*(other.table.blocks for other in self.scheduler.running))
        if self._may_fork(sequence):  # its first write takes one
            return pool.num_blocks > len(held)
        matches = sequence.table.matches(sequence.tokens)
        found = sum(length for _, length in matches)
        end = min(len(sequence.tokens), found + self.scheduler.max_step_tokens)
        shared = [node.block in held for node, _ in matches]
        copies = end > found and found % size != 0 and shared[-1]
        return pool.num_blocks - len(held) >= -(-end // size) - sum(shared) + copies

    def _check_patience(self, new: list[Sequence]) -> None:
        """Nobody waits for ever while newcomers keep coming."""
        for sequence in self.scheduler.waiting:
            if new and not self._awaits_prompt(sequence) and not self._waits(sequence):
                self._overtaken[sequence] += len(new)
                most = PATIENCE * self._ahead[sequence]
                assert self._overtaken[sequence] <= most, f"{sequence.id} was overtaken more than {most} times"
