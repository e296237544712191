"""The scheduler: which sequence computes which tokens in the next step.

Every sequence wants the same: `computed` to catch up with its tokens. A decode wants one token, a fresh prompt all of
them, a prefix hit or a resume the rest; one token budget a step serves them all.

    running    oldest first, each as much as the budget leaves
    preempted  then those that lost their blocks, in order of arrival
    waiting    then new ones, by the session that has been served least

When the pool has no room: idle blocks are evicted (the pool does that by itself), then resting tables are released,
longest rested first, then the newest running sequence that is not yet in the step is preempted. New arrivals never
push anybody out. So the oldest sequence always makes progress.
"""

import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.cache.table import BlockTable
from chatpage.errors import RequestError
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.sequence import Sequence, State
from chatpage.schedule.session import Session


@dataclass(slots=True)
class Chunk:
    """`count` tokens of a sequence from position `start`, in one step.

    Attributes:
        stores: False where the token's keys and values were found: it runs again only for its logits.
    """

    sequence: Sequence
    start: int
    count: int
    stores: bool = True

    @property
    def reaches_end(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn after this chunk."""
        return self.sequence.draws and self.reaches_end


@dataclass(slots=True)
class Step:
    """What one step computes, and the `(source, target)` block copies that must run before it."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    exhausted: list[Sequence] = field(default_factory=list)  # grew to the end of the pool; they can only end


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

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.preempted or self.waiting)

    def tables(self) -> list[BlockTable]:
        """Every table that holds blocks, for `BlockPool.check`."""
        rested = [session.resting for session in self.resting]
        live = [*self.running, *self.preempted, *self.waiting, *rested]
        return [sequence.table for sequence in live if sequence is not None]

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
        self, session: Session, prompt: Prompt, params: SamplingParams, *, seed: int = 0, draws: bool = True
    ) -> Sequence:
        """Queue one turn, which must fit (`require_room`)."""
        number = next(self._ids)
        table = BlockTable(self.pool, number, session.domain, prompt.system_tokens)
        sequence = Sequence(number, session, prompt, params, table, seed=seed, draws=draws)
        if not session.active:
            # Having been away earns no credit: start level with the least served of those who are here.
            here = {s.session for s in (*self.running, *self.preempted, *self.waiting)}
            session.served = max(session.served, min((other.served for other in here), default=0))
        session.active += 1
        self.waiting.append(sequence)
        self._become(sequence, "queued", "submitted")
        return sequence

    def end(self, sequence: Sequence, reason: str, *, failed: bool = False) -> None:
        """The turn is over, however it came to that. Its table rests, or is released. Harmless the second time.

        What a failed turn wrote last cannot be trusted: it is neither published nor kept.
        """
        if sequence.state in ("resting", "done"):
            return
        for queue in (self.running, self.preempted, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        session = sequence.session
        session.active -= 1
        sequence.table.truncate(min(sequence.computed, sequence.table.length), reason)
        if not failed:
            sequence.table.publish(sequence.tokens, sequence.table.length, tail=True)
        if session.keeps and sequence.table.length and not failed:
            self._rest(sequence, reason)
        else:
            self._leave(sequence, reason)
            if session.resting is not None:  # it never began, so the turn before it rests on
                self.events.emit("state", reason, sequence=session.resting.id, session=session.id, state="resting")

    def _rest(self, sequence: Sequence, reason: str) -> None:
        session = sequence.session
        self.wake(session, "a later turn rests")
        session.resting, session.rested_at = sequence, time.monotonic()
        self.resting[session] = None
        self._become(sequence, "resting", reason)

    def wake(self, session: Session, reason: str) -> None:
        """Release a session's resting table. What is written in it stays findable."""
        rested = session.resting
        if rested is not None:
            session.resting = None
            del self.resting[session]
            self._leave(rested, reason)

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
        budget = self.max_step_tokens
        for sequence in list(self.running):
            if not budget:
                break
            if sequence.state != "preempted":  # by an older one, a moment ago
                budget -= self._run(sequence, budget, step)
        while budget and len(self.running) < self.max_sequences:
            sequence = self._next_to_admit()
            if sequence is None:
                break
            if not self._admit(sequence):
                if not self.running:
                    step.exhausted.append(sequence)  # all is released by now, so it will never fit
                break
            ran = self._run(sequence, budget, step)
            if not ran:  # it had to make way again at once
                break
            budget -= ran
        return step

    def finish(self, step: Step) -> None:
        """The step's result is read back: what it computed may be found by others now."""
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.state in ("resting", "done") or not chunk.stores:
                continue
            sequence.computed += chunk.count
            sequence.session.served += chunk.count
            sequence.table.publish(sequence.tokens, sequence.computed)

    def _run(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Put the next tokens of a running sequence into the step. Returns how many."""
        if sequence.computed == len(sequence.tokens):  # everything was found
            chunk = Chunk(sequence, sequence.computed - 1, 1, stores=False)
        else:
            count = min(budget, len(sequence.tokens) - sequence.computed)
            if not self._append(sequence, count, step):
                return 0
            chunk = Chunk(sequence, sequence.computed, count)
        step.chunks.append(chunk)
        state = "decode" if sequence.generated or chunk.reaches_end else "prefill"
        self._become(sequence, state, "scheduled")
        return chunk.count

    def _append(self, sequence: Sequence, count: int, step: Step) -> bool:
        """Slots for `count` more tokens of a running sequence, at the cost of others where it must be."""
        while True:
            try:
                copied = sequence.table.append(count)
            except PoolFull:
                if self._release_longest_resting():
                    continue
                victim = self._victim(step)
                if victim is not sequence:
                    self._preempt(victim, step)
                    continue
                if step.chunks:
                    self._preempt(sequence, step)
                else:
                    step.exhausted.append(sequence)  # the oldest has taken from all others
                return False
            if copied:
                step.copies.append(copied)
            return True

    def _victim(self, step: Step) -> Sequence:
        """The newest running sequence that is not yet in the step; at worst the one that asks."""
        scheduled = {chunk.sequence.id for chunk in step.chunks}
        return next(s for s in reversed(self.running) if s.id not in scheduled)

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Take all blocks from a sequence. Its tokens stay; what was written may still be found when it resumes."""
        self.running.remove(sequence)
        self.preempted.append(sequence)
        self.preempted.sort(key=lambda s: s.id)
        step.preempted.append(sequence)
        sequence.state = "preempted"
        self.events.emit("preempt", "the pool is full", sequence=sequence.id, session=sequence.session.id)
        sequence.table.release("preempted")
        sequence.computed = 0

    def _release_longest_resting(self) -> bool:
        session = next(iter(self.resting), None)
        if session is None:
            return False
        self.wake(session, "the pool is full")
        return True

    # -- admission ------------------------------------------------------------------------------------------------

    def _next_to_admit(self) -> Sequence | None:
        if self.preempted:
            return self.preempted[0]
        return min(self.waiting, key=lambda s: (s.session.served, s.id), default=None)

    def _admit(self, sequence: Sequence) -> bool:
        """Start a sequence if its first chunk has room, from what is found already. Never preempts."""
        if not self._make_room(sequence):
            return False
        sequence.computed = sequence.table.find(sequence.tokens)
        if sequence.cached is None:
            sequence.cached = sequence.computed
        queue = self.preempted if sequence.state == "preempted" else self.waiting
        queue.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.id)
        self.wake(sequence.session, "the next turn goes on from it")
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Release resting tables until the first chunk fits, if that can be reached."""
        while not self._has_room(sequence):
            if not self._release_longest_resting():
                return False
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        pool, size = self.pool, self.pool.block_size
        hits = pool.tree.find(sequence.tokens, sequence.table.domain, sequence.system_tokens)
        found = sum(length for _, length in hits)
        end = min(len(sequence.tokens), found + self.max_step_tokens)
        needed = -(-end // size) - len(hits)
        if found % size and end > found:
            last = hits[-1][0].block
            needed += pool.ref[last] > 0 or last in pool.pinned  # its first write will copy it
        revived = sum(1 for node, _ in hits if pool.ref[node.block] == 0 and node.block not in pool.pinned)
        return pool.available - revived >= needed
