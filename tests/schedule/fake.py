"""A model without numbers, and a driver that does with a step what the engine does.

What a slot holds depends on its token and on every slot before it, as they are read from the pool at that moment. So an
answer is right only if each slot that it was computed from was.
"""

from collections.abc import Callable
from collections.abc import Sequence as Tokens

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.scheduler import Chunk, Scheduler, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session

ALPHABET = 3
GARBAGE = -1
WHOLE_STEP = -1


def state(before: Tokens[int], token: int) -> int:
    return hash((*before, token))


def draw(last: int) -> int:
    return last % ALPHABET


def answer(prompt: Tokens[int], count: int) -> list[int]:
    """The next `count` tokens, computed without any pool."""
    oracle = Oracle()
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(oracle.next(tokens))
    return tokens[len(prompt) :]


class Oracle:
    """The token that follows others, computed without any pool. It goes on from what it was asked last."""

    def __init__(self) -> None:
        self._states: list[int] = []

    def states(self, tokens: Tokens[int]) -> list[int]:
        """What the slots of `tokens` hold, which begin with those that were asked for before, or are their head."""
        for token in tokens[len(self._states) :]:
            self._states.append(state(self._states, token))
        return self._states[: len(tokens)]

    def next(self, tokens: Tokens[int]) -> int:
        return draw(self.states(tokens)[-1])


class FakePool(BlockPool):
    """A pool in which an allocation can fail although there is room.

    Attributes:
        fail_in: the how-manieth allocation from now finds no room; 0 is none.
        fail_for: the sequence whose next allocation finds no room; 0 is none.
        failed: how many did so.
    """

    fail_in = fail_for = failed = 0

    def allocate(self, sequence: int, logicals: Tokens[int], reason: str) -> list[int]:
        if logicals and self._fails(sequence):
            self.failed += 1
            raise PoolFull
        return super().allocate(sequence, logicals, reason)

    def _fails(self, sequence: int) -> bool:
        if self.fail_for == sequence:
            self.fail_for = 0
            return True
        was = self.fail_in
        self.fail_in = max(0, was - 1)
        return was == 1


class FakeModel:
    """Slots, and steps that write them; every write is checked against the write rule."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.slots = [[GARBAGE] * pool.block_size for _ in range(pool.num_blocks + 1)]

    def run(self, step: Step, broken: int = 0) -> list[int | None]:
        """The token that each chunk draws, if it draws one.

        Args:
            broken: bit i says that the i-th chunk fails. It draws nothing, and fills all that its sequence holds, the
                pinned blocks apart, with garbage.
        """
        self.copy(step.copies)
        self._check_writes(step)
        return [self._run(chunk, bool(broken >> i & 1)) for i, chunk in enumerate(step.chunks)]

    def copy(self, copies: list[tuple[int, int]]) -> None:
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
        if broken:
            self.spoil(sequence)
            return None
        before = [self.slots[b][o] for b, o in (self._place(sequence, p) for p in range(chunk.start))]
        for position, (block, offset) in enumerate(self._places(chunk), chunk.start):
            before.append(state(before, sequence.tokens[position]))
            if chunk.stores:
                self.slots[block][offset] = before[-1]
        return draw(before[-1]) if chunk.draws else None

    def spoil(self, sequence: Sequence) -> None:
        """Fill all that a sequence holds, the pinned blocks apart, with garbage."""
        for block in set(sequence.table.blocks) - self.pool.pinned:
            self.slots[block] = [GARBAGE] * self.pool.block_size


def take_step(scheduler: Scheduler, model: FakeModel, limits: dict[int, int], broken: int = 0) -> Step:
    """One step from its schedule to its tokens. `limits` has the length at which each sequence ends."""
    step = scheduler.schedule()
    compute(step, scheduler, model, limits, broken)
    return step


def compute(
    step: Step,
    scheduler: Scheduler,
    model: FakeModel,
    limits: dict[int, int],
    broken: int = 0,
    fail: Callable[[Sequence], object] | None = None,
) -> None:
    """Run a step, end whom it fails (`broken`, as in `FakeModel.run`), publish it, and hand out its tokens."""
    for sequence in step.exhausted:
        scheduler.end(sequence, "length")
    drawn = model.run(step, broken)
    culprits, _ = scheduler.distrust([chunk.sequence for i, chunk in enumerate(step.chunks) if broken >> i & 1])
    for sequence in culprits:
        if fail:
            fail(sequence)
        else:
            scheduler.fail(sequence, "error")
    scheduler.finish(step)
    for chunk, token in zip(step.chunks, drawn, strict=True):
        sequence = chunk.sequence
        if token is not None and sequence.is_running:
            sequence.tokens.append(token)
            if len(sequence.tokens) == limits[sequence.id]:
                scheduler.end(sequence, "length")


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
