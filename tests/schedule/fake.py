"""A model without numbers, and a driver that does with a step what the engine does.

What a slot holds depends on its token and on every slot before it, as they are read from the pool at that moment. So an
answer is right only if each slot that it was computed from was.
"""

from collections.abc import Sequence as Tokens
from typing import Literal

from chatpage.cache.pool import BlockPool
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.scheduler import Chunk, Scheduler, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session

ALPHABET = 3
GARBAGE = -1

Fault = Literal["none", "one row", "whole step"]


def state(before: Tokens[int], token: int) -> int:
    return hash((*before, token))


def draw(last: int) -> int:
    return last % ALPHABET


def answer(prompt: Tokens[int], count: int) -> list[int]:
    """The next `count` tokens, computed without any pool."""
    states: list[int] = []
    for token in prompt:
        states.append(state(states, token))
    tokens = []
    for _ in range(count):
        tokens.append(draw(states[-1]))
        states.append(state(states, tokens[-1]))
    return tokens


class FakeModel:
    """Slots, and steps that write them; every write is checked against the write rule."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.slots = [[GARBAGE] * pool.block_size for _ in range(pool.num_blocks + 1)]

    def run(self, step: Step, broken: Tokens[Sequence] = ()) -> list[int | None]:
        """The token that each chunk draws, if it draws one. Sequences in `broken` write garbage, and draw nothing."""
        self._copy(step.copies)
        self._check_writes(step)
        return [self._run(chunk, chunk.sequence in broken) for chunk in step.chunks]

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        heads = [(target, list(self.slots[source])) for source, target in copies]
        for target, slots in heads:
            self.slots[target] = slots

    def _check_writes(self, step: Step) -> None:
        places = [place for chunk in step.chunks if chunk.stores for place in self._places(chunk)]
        assert len(set(places)) == len(places), "a slot is written twice in one step"
        for block, _ in places:
            assert self.pool.ref[block] == 1, f"block {block} is written under {self.pool.ref[block]} references"
            assert self.pool.node[block] is None, f"block {block} is written although it can be found"
            assert block not in self.pool.pinned, f"block {block} is written although it is pinned"

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        logical, offset = divmod(position, self.pool.block_size)
        return sequence.table.blocks[logical], offset

    def _places(self, chunk: Chunk) -> list[tuple[int, int]]:
        return [self._place(chunk.sequence, p) for p in range(chunk.start, chunk.start + chunk.count)]

    def _run(self, chunk: Chunk, broken: bool) -> int | None:
        sequence = chunk.sequence
        before = [self.slots[b][o] for b, o in (self._place(sequence, p) for p in range(chunk.start))]
        for position, (block, offset) in enumerate(self._places(chunk), chunk.start):
            before.append(GARBAGE if broken else state(before, sequence.tokens[position]))
            if chunk.stores:
                self.slots[block][offset] = before[-1]
        return draw(before[-1]) if chunk.draws and not broken else None


def take_step(scheduler: Scheduler, model: FakeModel, limits: dict[int, int], fault: Fault = "none") -> Step:
    """One step from its schedule to its tokens. `limits` has the length at which each sequence ends."""
    step = scheduler.schedule()
    for sequence in step.exhausted:
        scheduler.end(sequence, "length")
    chosen = [chunk.sequence for chunk in step.chunks][: {"none": 0, "one row": 1, "whole step": None}[fault]]
    drawn = model.run(step, chosen)
    for sequence in chosen:
        scheduler.fail(sequence, "error")
    if fault != "whole step":
        scheduler.finish(step)
    for chunk, token in zip(step.chunks, drawn, strict=True):
        sequence = chunk.sequence
        if token is not None and sequence.is_running:
            sequence.tokens.append(token)
            if len(sequence.tokens) == limits[sequence.id]:
                scheduler.end(sequence, "length")
    return step


def pin_system(scheduler: Scheduler, model: FakeModel, prompt: Tokens[int]) -> None:
    """Compute a system prompt and pin it, as an engine does at its start."""
    session = Session(0, domain=None, keeps=False)
    sequence = scheduler.submit(session, Prompt(tuple(prompt), len(prompt)), SamplingParams(), draws=False)
    while sequence.computed < len(prompt):
        take_step(scheduler, model, {})
    sequence.table.publish(sequence.tokens, sequence.computed, tail=True)
    for logical, block in enumerate(sequence.table.blocks):
        scheduler.pool.pin(block, logical=logical, at=len(prompt), name="default")
    scheduler.end(sequence, "the system prompt is computed")
