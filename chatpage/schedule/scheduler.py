"""The scheduler: which sequence computes which tokens in the next step.

Every sequence wants the same: `computed` to catch up with its tokens. A decode wants one token, a fresh prompt all of
them, a prefix hit or a resume the rest; one token budget a step serves them all.

    running    oldest first, each as much as the budget leaves; while somebody decodes, it is halved
    preempted  then those that lost their blocks, in order of arrival
    waiting    then new ones, by the session that has been served least; every PATIENCE-th by arrival

A sequence whose next block is just being filled by one that it may share with is not started before that block is
there: what two ask at once is computed once.

When the pool has no room: idle blocks are evicted (the pool does that by itself), then resting tables are released,
longest rested first, then the newest running sequence that is not yet in the step is preempted. New arrivals never
push anybody out. So the oldest sequence always makes progress.

A step may be scheduled while the one before it is in flight: scheduled, and not read back (`finish`). A sequence then
gets a slot for a token that nobody knows yet. Only known tokens are matched and published, and nobody is preempted out
of a step in flight: that one is read back first, and may end somebody.
"""

import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.cache.prefix import Node
from chatpage.cache.table import BlockTable
from chatpage.errors import RequestError
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.sequence import Sequence, State
from chatpage.schedule.session import Session

# However many new sessions keep coming, who has waited longest gets every so many-th place. Without that, a session
# that has been served more than they would wait for ever.
PATIENCE = 8


@dataclass(slots=True)
class Chunk:
    """`count` tokens of a sequence from position `start`, in one step.

    Attributes:
        stores: False where the token's keys and values were found: it runs again only for its logits.
        draws: whether the next token is drawn after them.
        life: of the sequence, when this was scheduled.
    """

    sequence: Sequence
    start: int
    count: int
    stores: bool = True
    draws: bool = False
    life: int = 0

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def is_wanted(self) -> bool:
        """Whether what it gives counts: its sequence may have ended, or lost its blocks, while it was in flight."""
        return self.life == self.sequence.life


@dataclass(slots=True)
class Step:
    """What one step computes, and the `(source, target)` block copies that must run before it.

    Attributes:
        exhausted: sequences that grew to the end of the pool; they can only end.
        lacks_room: whether somebody needs blocks of one who is in the step in flight; that one is left out, so that it
            can be preempted when it has its token.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    exhausted: list[Sequence] = field(default_factory=list)
    lacks_room: bool = False

    @property
    def is_awaited(self) -> bool:
        """Whether it must be read back before the next step is scheduled."""
        return any(chunk.draws and chunk.sequence.looks_back for chunk in self.chunks)


class Scheduler:
    """Owns all sequences. Belongs to one thread.

    Args:
        max_sequences: how many run at once.
        max_step_tokens: the token budget of a step.
    """

    def __init__(self, pool: BlockPool, *, max_sequences: int, max_step_tokens: int) -> None:
        self.pool = pool
        self.events = pool.events
        self.max_sequences = max_sequences
        self.max_step_tokens = max_step_tokens
        self.running: list[Sequence] = []  # oldest first
        self.preempted: list[Sequence] = []  # oldest first
        self.waiting: list[Sequence] = []  # in order of arrival
        self.resting: OrderedDict[Session, None] = OrderedDict()  # longest rested first
        self._ids = itertools.count(1)
        self._admitted = 0  # new sequences, so far

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.preempted or self.waiting)

    def tables(self) -> list[BlockTable]:
        """Every table that holds blocks, for `BlockPool.check`."""
        rested = [sequence for session in self.resting for sequence in session.resting]
        return [sequence.table for sequence in (*self.running, *self.preempted, *self.waiting, *rested)]

    # -- arrival and end ------------------------------------------------------------------------------------------

    def require_room(self, prompt: Prompt) -> None:
        """Refuse what the pool could not hold even if nobody else were there. May be called from any thread.

        Raises:
            RequestError: with both numbers of blocks.
        """
        size = self.pool.block_size
        needed = -(-(len(prompt.tokens) + 1) // size) - prompt.system_tokens // size
        usable = self.pool.num_blocks - len(self.pool.pinned)
        if needed > usable:
            raise RequestError(
                f"The prompt needs {needed} blocks of {size} tokens, but the pool has {usable} besides the system "
                "prompt's; shorten the prompt, or start with more --kv-blocks.",
                param="messages",
                code="context_length_exceeded",
            )

    def submit(
        self,
        session: Session,
        prompt: Prompt,
        params: SamplingParams,
        *,
        seed: int = 0,
        draws: bool = True,
        limit: int | None = None,
        width: int = 1,
        candidates: int = 0,
    ) -> Sequence:
        """Queue one turn, which must fit (`require_room`). The other arguments are attributes of `Sequence`.

        A width must not be more than `max_sequences`.
        """
        number = next(self._ids)
        table = BlockTable(self.pool, number, session.domain, prompt.system_tokens)
        sequence = Sequence(
            number,
            session,
            prompt,
            params,
            table,
            seed=seed,
            draws=draws,
            limit=limit,
            width=width,
            candidates=candidates,
        )
        if not session.active:
            # Having been away earns no credit: start level with the least served of those who are here.
            here = {s.session for s in (*self.running, *self.preempted, *self.waiting)}
            session.served = max(session.served, min((other.served for other in here), default=0))
        self._queue(sequence)
        return sequence

    def submit_reply(self, origin: Sequence, choice: int) -> Sequence:
        """Queue another reply to a prompt that was just submitted. It forks the table of `origin`, the first reply."""
        session, prompt = origin.session, Prompt(tuple(origin.tokens), origin.system_tokens)
        number = next(self._ids)
        table = BlockTable(self.pool, number, session.domain, prompt.system_tokens)
        sequence = Sequence(number, session, prompt, origin.params, table, seed=origin.seed, limit=origin.limit)
        sequence.origin, sequence.turn, sequence.choice = origin, origin.turn, choice
        self._queue(sequence)
        return sequence

    def branch(self, parent: Sequence) -> Sequence:
        """A second sequence that runs on from where a running beam is, and shares all its blocks.

        All of the beam's tokens must be computed, and none be in flight.
        """
        assert parent.is_running, f"sequence {parent.id} does not run"
        assert parent.computed == len(parent.tokens) == parent.table.length, f"sequence {parent.id} is in flight"
        number, session = next(self._ids), parent.session
        prompt = Prompt(tuple(parent.tokens), parent.system_tokens)
        table = parent.table.fork(number, parent.computed, session=session.id)
        child = Sequence(number, session, prompt, parent.params, table, seed=parent.seed, limit=parent.limit)
        child.prompt_length, child.computed, child.cached = parent.prompt_length, parent.computed, parent.cached
        child.turn, child.width, child.candidates = parent.turn, parent.width, parent.candidates
        child.looks_back, child.state = parent.looks_back, parent.state
        session.active += 1
        self._start(child)
        return child

    def _queue(self, sequence: Sequence) -> None:
        sequence.session.active += 1
        self.waiting.append(sequence)
        self._become(sequence, "queued", "submitted")

    def end(self, sequence: Sequence, reason: str) -> None:
        """The turn is over, and well. Its table rests, or is released. Harmless the second time.

        What a step in flight writes for it is given back: whoever gets those slots writes them later.
        """
        if sequence.state in ("resting", "done"):
            return
        self._dequeue(sequence)
        sequence.table.truncate(sequence.computed, reason)
        sequence.table.publish(sequence.tokens, sequence.table.length, tail=True)
        if sequence.session.keeps and sequence.table.length:
            self._rest(sequence, reason)
        else:
            self._leave(sequence, reason)

    def drop(self, sequence: Sequence, reason: str) -> None:
        """Nobody wants it any more: it does not rest. Its full blocks stay findable."""
        self._dequeue(sequence)
        self._leave(sequence, reason)

    def let_go(self, sequence: Sequence, reason: str) -> None:
        """Release a table that rests. Harmless if it does not, any more."""
        if sequence.state == "resting":
            self._wake(sequence, reason)

    def fail(self, sequence: Sequence, reason: str) -> list[Sequence]:
        """The turn is over, and what it computed cannot be trusted: of what it holds, nothing will be found again.

        Whoever else holds one of its blocks, the pinned ones apart, loses all and computes again.

        Returns:
            The running sequences that were preempted for that.
        """
        if sequence.state in ("resting", "done"):
            return []
        _, holders = self.distrust([sequence])
        self._dequeue(sequence)
        self._leave(sequence, reason)
        return holders

    def distrust(
        self, broken: list[Sequence], copies: Collection[tuple[int, int]] = ()
    ) -> tuple[list[Sequence], list[Sequence]]:
        """The results of these sequences, in the order of the step, cannot be trusted, nor can what they hold.

        Who holds a block of an earlier broken one may be innocent. It loses all and computes again, as do all others
        who hold a block of any of them. Of several, this is for all together, while each still has its table.

        Args:
            copies: those of the step that is in flight meanwhile: what it copied from a suspect is one too.

        Returns:
            Who must fail, and who was preempted.
        """
        held = {sequence: set(sequence.table.blocks) - self.pool.pinned for sequence in broken}
        culprits: list[Sequence] = []
        for sequence in broken:
            if not any(held[sequence] & held[other] for other in culprits):
                culprits.append(sequence)
        suspects = set().union(*held.values())
        suspects.update([target for source, target in copies if source in suspects])
        for sequence in broken:
            for block in sequence.table.blocks:
                if block in suspects and self.pool.node[block] is not None:
                    self.pool.unpublish(block, "its computation failed")
        holders = [s for s in self.running if s not in culprits and suspects.intersection(s.table.blocks)]
        for holder in holders:
            self.preempt(holder, "a block that it held failed")
        for sequence in [s for session in self.resting for s in session.resting]:
            if suspects.intersection(sequence.table.blocks):
                self._wake(sequence, "a block that it held failed")
        return culprits, holders

    def _dequeue(self, sequence: Sequence) -> None:
        for queue in (self.running, self.preempted, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        sequence.drop_pending()
        sequence.session.active -= 1

    def _rest(self, sequence: Sequence, reason: str) -> None:
        session = sequence.session
        session.resting.append(sequence)
        session.rested_at = time.monotonic()
        self.resting[session] = None
        self.resting.move_to_end(session)
        self._become(sequence, "resting", reason)

    def wake(self, session: Session, reason: str, *, but: int | None = None) -> None:
        """Release a session's resting tables, but for those of one turn. What is written in them stays findable."""
        for sequence in session.resting[:]:
            if sequence.turn != but:
                self._wake(sequence, reason)

    def keep(self, session: Session, choice: int) -> None:
        """Release the resting tables of all replies but one. What rests of a session is of one turn."""
        for sequence in session.resting[:]:
            if sequence.choice != choice:
                self._wake(sequence, "another reply was chosen")

    def _wake(self, sequence: Sequence, reason: str) -> None:
        session = sequence.session
        session.resting.remove(sequence)
        if not session.resting:
            del self.resting[session]
        self._leave(sequence, reason)

    def _leave(self, sequence: Sequence, reason: str) -> None:
        sequence.table.release(reason)
        sequence.state = "done"
        self.events.emit("end", reason, sequence=sequence.id)

    def _become(self, sequence: Sequence, state: State, reason: str) -> None:
        if sequence.state != state or state == "queued":
            sequence.state = state
            self.events.emit("state", reason, sequence=sequence.id, session=sequence.session.id, state=state)

    # -- one step -------------------------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Choose what the next step computes, and give every token in it a slot."""
        step = Step()
        budget = self._budget()
        for sequence in list(self.running):
            if not budget or step.lacks_room:  # who is newer must not take what an older one needs
                break
            if sequence.state != "preempted" and not sequence.waits:  # it may have been preempted a moment ago
                budget -= self._run(sequence, budget, step)
        if not (step.preempted or step.lacks_room):  # who just lost his blocks would only take them from others again
            self._admit_others(budget, step)
        return step

    def _budget(self) -> int:
        """Tokens of the next step. Whoever decodes waits for the whole step, so prompts take what half of it leaves.

        Where that is little, they take as much as all decodes together.
        """
        most, decodes = self.max_step_tokens, sum(sequence.state == "decode" for sequence in self.running)
        return max(most // 2, min(2 * decodes, most)) if decodes else most

    def finish(self, step: Step) -> None:
        """The step's result is read back: what it computed may be found by others now.

        The caller appends what it drew to the tokens of those of its chunks that are still wanted.
        """
        for chunk in step.chunks:
            sequence = chunk.sequence
            if not chunk.is_wanted:
                continue
            sequence.pending -= chunk.draws
            if chunk.stores:
                sequence.computed += chunk.count
                sequence.session.served += chunk.count
                sequence.table.publish(sequence.tokens, sequence.computed)

    def _run(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Put the next tokens of a running sequence into the step. Returns how many."""
        table, length, stores = sequence.table, sequence.length, True
        start = table.length
        count = min(budget, length - start)
        if sequence.pending and length == sequence.limit:  # its last token is on its way
            return 0
        if not count:  # everything was found
            start, count, stores = start - 1, 1, False
        elif not (table.append_in_place(count) or self._append(sequence, count, step)):
            return 0
        reaches_end = start + count == length
        draws = reaches_end and sequence.draws
        sequence.pending += draws
        step.chunks.append(Chunk(sequence, start, count, stores, draws, sequence.life))
        if sequence.state != "decode":  # who decodes goes on with it
            self._become(sequence, "decode" if reaches_end or sequence.generated else "prefill", "scheduled")
        return count

    def _append(self, sequence: Sequence, count: int, step: Step) -> bool:
        """Slots for `count` more tokens of a running sequence, at the cost of others where it must be.

        A copy of its last block waits for the step in flight, which reads or writes that block: should the step fail,
        it must still be in the table (`distrust`).
        """
        if sequence.pending and sequence.table.must_copy:
            return False
        while True:
            try:
                copied = sequence.table.append(count)
            except PoolFull:
                if self._release_longest_resting():
                    continue
                victim = self._victim(step) if sequence.is_running else sequence  # who is new pushes nobody out
                if victim.is_in_flight:
                    step.lacks_room = True
                    return False
                if victim is sequence and all(s is victim or _waits_for(s, victim) for s in self.running):
                    step.exhausted.append(sequence)  # it has taken from all others
                    return False
                self.preempt(victim, "the pool is full")
                step.preempted.append(victim)
                if victim is sequence:
                    return False
                continue
            if copied:
                step.copies.append(copied)
            return True

    def _victim(self, step: Step) -> Sequence:
        """The newest running sequence that is not yet in the step; at worst the one that asks."""
        scheduled = {chunk.sequence.id for chunk in step.chunks}
        return next(s for s in reversed(self.running) if s.id not in scheduled)

    def preempt(self, sequence: Sequence, reason: str) -> None:
        """Take all blocks from a running sequence. Its tokens stay; what was written may still be found later."""
        self.running.remove(sequence)
        self.preempted.append(sequence)
        self.preempted.sort(key=lambda s: s.age)
        sequence.state = "preempted"
        self.events.emit("preempt", reason, sequence=sequence.id, session=sequence.session.id)
        sequence.table.release("preempted")
        sequence.drop_pending()
        sequence.computed = 0

    def _release_longest_resting(self) -> bool:
        session = next(iter(self.resting), None)
        if session is None:
            return False
        self.wake(session, "the pool is full")
        return True

    # -- admission ------------------------------------------------------------------------------------------------

    def _admit_others(self, budget: int, step: Step) -> None:
        """Start sequences while places and budget last. None of them pushes another one out."""
        if not (self.preempted or self.waiting):
            return
        places = self._places()
        if not budget or not (self.preempted or places):  # the usual step of a full house need not sort those who wait
            return
        for sequence in self._by_turn():
            taken = 0 if sequence.width > 1 and self._has_place(sequence.turn) else sequence.width
            if not budget or (taken > max(places, 0) and not self._nobody_computes()):
                break
            places -= taken  # also for one that waits for a block: it is not overtaken for good
            if self._awaits_block(sequence) or self._awaits_prompt(sequence):
                continue
            if self._may_fork(sequence):
                if not (self.pool.available or self.resting):  # its first write copies a block
                    break
                self._admit(sequence, self._fork(sequence))
            else:
                matches = sequence.table.matches(sequence.tokens)
                if self._must_await(sequence, matches):
                    continue
                if not self._has_room(sequence, matches):
                    if self._nobody_computes():  # and so nobody will make room by ending
                        self._clear_the_way(sequence, step)
                    break
                self._admit(sequence, sequence.table.take(matches))
            ran = self._run(sequence, budget, step)
            if not ran:  # it had to make way again at once
                break
            budget -= ran

    def _places(self) -> int:
        """How many sequences may be started. A search has places for all its beams from the beginning.

        Less than 0 where there were more places when those who run began. Then, or for a search that is wider than what
        is left of the places, somebody may start all the same if nobody would compute anything otherwise.
        """
        beams = {s.turn: s.width for s in self.running if s.width > 1}
        others = sum(s.width == 1 for s in self.running)
        return self.max_sequences - others - sum(beams.values())

    def _nobody_computes(self) -> bool:
        """Whether all who run, if anybody does, are beams that wait for others."""
        return all(sequence.waits for sequence in self.running)

    def _has_place(self, turn: int) -> bool:
        return any(running.turn == turn for running in self.running)

    def _clear_the_way(self, sequence: Sequence, step: Step) -> None:
        """All who run are beams that wait for others which were preempted: the newest search makes way.

        If there is no other one, the sequence would have the pool for itself and its own search, so it will never fit.
        """
        newest = next((s.turn for s in reversed(self.running) if s.turn != sequence.turn), None)
        if newest is None:
            step.exhausted.append(sequence)
            return
        for beam in [s for s in self.running if s.turn == newest]:
            self.preempt(beam, "another search needs its blocks")
            step.preempted.append(beam)

    def _by_turn(self) -> Iterator[Sequence]:
        """Who is to start next: the preempted ones by arrival; once all of them run, new ones."""
        yield from list(self.preempted)
        if self.preempted:
            return
        left = sorted(self.waiting, key=lambda s: (s.session.served, s.id))
        while left:
            is_by_arrival = self._admitted % PATIENCE == PATIENCE - 1
            chosen = min(left, key=lambda s: s.id) if is_by_arrival else left[0]
            left.remove(chosen)
            yield chosen

    def _admit(self, sequence: Sequence, found: int) -> None:
        """Start a sequence from the tokens that its table has already."""
        sequence.computed = found
        if sequence.cached is None:
            sequence.cached = sequence.computed
            self._admitted += 1
        queue = self.preempted if sequence.state == "preempted" else self.waiting
        queue.remove(sequence)
        self._start(sequence)
        self.wake(sequence.session, "the next turn goes on from it", but=sequence.turn)

    def _start(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.age)

    def _awaits_block(self, sequence: Sequence) -> bool:
        """Whether it is known to wait, and the block is still to come."""
        if sequence.awaits is None:
            return False
        other, end = sequence.awaits
        return other.is_running and other.computed < end

    @staticmethod
    def _awaits_prompt(sequence: Sequence) -> bool:
        """Whether the first reply has still to compute the prompt that this one will fork."""
        origin = sequence.origin
        if origin is None or sequence.state != "queued":
            return False
        return origin.state not in ("resting", "done") and origin.computed < sequence.prompt_length

    @staticmethod
    def _may_fork(sequence: Sequence) -> bool:
        """Whether the first reply has the whole prompt in its table. (If it has ended, it is found by its content.)"""
        return sequence.origin is not None and sequence.state == "queued" and sequence.origin.is_running

    def _fork(self, sequence: Sequence) -> int:
        """Share the blocks of the prompt, its last one too. Returns how many tokens they hold."""
        assert sequence.origin is not None
        table, at = sequence.origin.table, sequence.prompt_length
        sequence.table = table.fork(sequence.id, at, session=sequence.session.id)
        return at

    def _must_await(self, sequence: Sequence, matches: list[tuple[Node, int]]) -> bool:
        """Whether a running sequence fills the block that would be found next, and will publish it."""
        size = self.pool.block_size
        found = sum(length for _, length in matches)
        end = found - found % size + size
        wanted = sequence.tokens[:end]
        fillers = (s for s in self.running if s.computed < end and s.tokens[:end] == wanted and _share(s, sequence))
        filler = next(fillers, None) if len(wanted) == end else None
        sequence.awaits = None if filler is None else (filler, end)
        return filler is not None

    def _has_room(self, sequence: Sequence, matches: list[tuple[Node, int]]) -> bool:
        """Whether the first chunk fits beside all who run. Resting tables make way for it then (`_append`)."""
        fits_now = self._fits(sequence, matches, frozenset())
        return fits_now or (bool(self.resting) and self._fits(sequence, matches, self._held_by_resting()))

    def _held_by_resting(self) -> set[int]:
        """The blocks that nobody but resting tables holds."""
        tables = [sequence.table for session in self.resting for sequence in session.resting]
        counts = Counter(block for table in tables for block in table.blocks)
        return {block for block, n in counts.items() if n == self.pool.ref[block] and block not in self.pool.pinned}

    def _fits(self, sequence: Sequence, matches: list[tuple[Node, int]], released: Collection[int]) -> bool:
        """Whether the first chunk would fit if nobody held the blocks `released`."""
        pool, size = self.pool, self.pool.block_size

        def is_held(block: int) -> bool:
            return block in pool.pinned or (pool.ref[block] > 0 and block not in released)

        found = sum(length for _, length in matches)
        end = min(len(sequence.tokens), found + self.max_step_tokens)
        needed = -(-end // size) - len(matches)
        if found % size and end > found:
            needed += is_held(matches[-1][0].block)  # its first write will copy it
        revived = sum(not is_held(node.block) for node, _ in matches)
        return pool.available + len(released) - revived >= needed


def _waits_for(a: Sequence, b: Sequence) -> bool:
    """Whether `a` can only go on when `b` has caught up, as both are beams of one search."""
    return a.waits and a.turn == b.turn


def _share(a: Sequence, b: Sequence) -> bool:
    """Whether what `a` publishes is found by `b`, where their tokens are the same."""
    return a.table.domain == b.table.domain and a.system_tokens == b.system_tokens and a.table.is_findable
