"""Real events without a model: sessions that talk, share, rest, come back and leave, on the real scheduler and pool."""

import random

from chatpage.cache.pool import BlockPool
from chatpage.errors import RequestError
from chatpage.events import Event, EventLog, Snapshot
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.scheduler import Scheduler
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session

BLOCK_SIZE = 4
SYSTEM = tuple(range(100, 106))  # ends inside a block


class Story:
    """`snapshot` is the state after the system prompt; `more` lets things happen and returns their events."""

    def __init__(self, seed: int, *, blocks: int = 24, sharing: str = "all") -> None:
        self.random = random.Random(seed)
        self.log = EventLog()
        self.events: list[Event] = []
        self.log.listeners.append(self.events.append)
        self.pool = BlockPool(blocks, BLOCK_SIZE, self.log)
        self.scheduler = Scheduler(self.pool, max_sequences=4, max_step_tokens=16)
        self.snapshot = Snapshot.empty(self.log, block_size=BLOCK_SIZE, num_blocks=blocks)
        self._pin_system_prompt()
        self.sessions = [Session(i, "all" if sharing == "all" else i) for i in range(1, 5)]
        self.texts: dict[int, list[int]] = {session.id: list(SYSTEM) for session in self.sessions}
        self.running: list[Sequence] = []
        self.snapshot.apply_all(self._taken())

    def more(self, steps: int = 1) -> list[Event]:
        for _ in range(steps):
            self.random.choice([self._ask, self._ask, self._step, self._step, self._step, self._end, self._leave])()
        return self._taken()

    def _taken(self) -> list[Event]:
        events = self.events[:]
        self.events.clear()
        return events

    def _pin_system_prompt(self) -> None:
        sequence = self.scheduler.submit(
            Session(0, None, keeps=False), Prompt(SYSTEM, 6), SamplingParams(), draws=False
        )
        self.running = [sequence]
        self._step()
        sequence.table.publish(sequence.tokens, sequence.computed, tail=True)
        for logical, block in enumerate(sequence.table.blocks):
            self.pool.pin(block, logical=logical, at=len(SYSTEM), name="default")
        self.scheduler.end(sequence, "computed")

    def _ask(self) -> None:
        session = self.random.choice(self.sessions)
        if session.active:
            return
        text = self.texts[session.id]
        text += [self.random.randrange(3) for _ in range(self.random.randrange(1, 9))]
        try:
            sequence = self.scheduler.submit(session, Prompt(tuple(text), len(SYSTEM)), SamplingParams())
        except RequestError:
            self.texts[session.id] = list(SYSTEM)
            return
        self.running.append(sequence)

    def _step(self) -> None:
        step = self.scheduler.schedule()
        self.scheduler.finish(step)
        for chunk in step.chunks:
            if chunk.draws:
                chunk.sequence.tokens.append(self.random.randrange(3))
        for sequence in step.exhausted:
            self._finish(sequence)

    def _end(self) -> None:
        if self.running:
            self._finish(self.random.choice(self.running))

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.end(sequence, "stop")
        self.texts[sequence.session.id] = sequence.tokens[: sequence.computed] or list(SYSTEM)
        self.running.remove(sequence)

    def _leave(self) -> None:
        session = self.random.choice(self.sessions)
        if not session.active:
            self.scheduler.wake(session, "the tab was closed")
            self.texts[session.id] = list(SYSTEM)
