"""A model without numbers, and a driver that does with a step what the engine does.

What a slot holds depends on its token and on every slot before it, as they are read from the pool at that moment. So an
answer is right only if each slot that it was computed from was.
"""

from collections.abc import Callable, Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.scheduler import Chunk, Scheduler, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session

ALPHABET = 3
ENDS = (4, 5)  # the tokens that end a beam
VOCABULARY = 6  # of beams
GARBAGE = -1
WHOLE_STEP = -1

Candidates = list[tuple[int, float]]
Drawn = int | Candidates | None  # a token, what a beam could go on with, or nothing


def state(before: Tokens[int], token: int) -> int:
    return hash((*before, token))


def draw(last: int, choice: int) -> int:
    """Each reply to a prompt looks at other digits, so some go the same way for a while, and then part."""
    return (last >> 3 * choice) % ALPHABET


def likeliest(last: int, count: int) -> Candidates:
    """The tokens that a beam could go on with, no two of which are as likely."""
    logprobs = ((token, -(last >> 8 * token) % 256 / 64 - token / 1024 - 5) for token in range(VOCABULARY))
    return sorted(logprobs, key=lambda pair: -pair[1])[:count]


def answer(prompt: Tokens[int], count: int, choice: int = 0) -> list[int]:
    """The next `count` tokens, computed without any pool."""
    oracle = Oracle(choice)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(oracle.next(tokens))
    return tokens[len(prompt) :]


class Oracle:
    """The token that follows others in one reply, computed without any pool. It goes on from what it was asked last."""

    def __init__(self, choice: int = 0) -> None:
        self._choice = choice
        self._states: list[int] = []

    def states(self, tokens: Tokens[int]) -> list[int]:
        """What the slots of `tokens` hold, which begin with those that were asked for before, or are their head."""
        for token in tokens[len(self._states) :]:
            self._states.append(state(self._states, token))
        return self._states[: len(tokens)]

    def next(self, tokens: Tokens[int]) -> int:
        return draw(self.states(tokens)[-1], self._choice)


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


@dataclass
class FakeRow:
    """A chunk as the device knows it: the slots of all tokens up to its end, and its own tokens.

    Attributes:
        tokens: None stands for the one that the step before draws.
    """

    chunk: Chunk
    blocks: list[int]
    tokens: list[int | None]
    is_broken: bool


@dataclass
class FakeFlight:
    """A step that was launched: its copies are made, but no row is computed before one must be."""

    step: Step
    rows: list[FakeRow]
    drawn: list[Drawn] | None = None


class FakeModel:
    """Slots, and steps that write them; every write is checked against the write rule."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.slots = [[GARBAGE] * pool.block_size for _ in range(pool.num_blocks + 1)]
        self._last: FakeFlight | None = None
        self._drawn: dict[Sequence, Drawn] = {}  # by the step that was computed last

    def launch(self, step: Step, broken: int = 0) -> FakeFlight:
        """Make a step's copies, once all is computed that was launched before, and take down what its rows are.

        Args:
            broken: bit i says that the i-th chunk fails. It draws nothing, and fills all that its sequence holds, the
                pinned blocks apart, with garbage.
        """
        if self._last:
            self.read(self._last)
        self._check_writes(step)
        heads = [(target, list(self.slots[source])) for source, target in step.copies]
        for target, slots in heads:
            self.slots[target] = slots
        self._last = FakeFlight(step, [self._row(chunk, bool(broken >> i & 1)) for i, chunk in enumerate(step.chunks)])
        return self._last

    @staticmethod
    def _row(chunk: Chunk, is_broken: bool) -> FakeRow:
        known = chunk.sequence.tokens[chunk.start : chunk.end]
        assert len(known) >= chunk.count - 1, "a chunk has two tokens that are not known yet"
        return FakeRow(chunk, list(chunk.sequence.table.blocks), [*known, None][: chunk.count], is_broken)

    def read(self, flight: FakeFlight) -> list[Drawn]:
        """What each chunk draws, if it draws something."""
        if flight.drawn is None:
            flight.drawn = [self._compute(row) for row in flight.rows]
            self._drawn = {row.chunk.sequence: token for row, token in zip(flight.rows, flight.drawn, strict=True)}
        return flight.drawn

    def _check_writes(self, step: Step) -> None:
        places = [place for chunk in step.chunks if chunk.stores for place in self._places(chunk)]
        assert len(set(places)) == len(places), "a slot is written twice in one step"
        for block, offset in places:
            forks = [chunk for chunk in step.chunks if self._forks(chunk, block, offset)]
            assert self.pool.ref[block] == 1 + len(forks), f"block {block} is written under other references"
            assert self.pool.node[block] is None, f"block {block} is written although it can be found"
            assert block not in self.pool.pinned, f"block {block} is written although it is pinned"

    def _forks(self, chunk: Chunk, block: int, offset: int) -> bool:
        """Whether it forked, after another one had got that slot, a table with that block; and has no such slot."""
        blocks, size = chunk.sequence.table.blocks, self.pool.block_size
        return not chunk.stores and block in blocks and chunk.end <= blocks.index(block) * size + offset

    def _places(self, chunk: Chunk) -> list[tuple[int, int]]:
        blocks, size = chunk.sequence.table.blocks, self.pool.block_size
        return [(blocks[p // size], p % size) for p in range(chunk.start, chunk.end)]

    def _compute(self, row: FakeRow) -> Drawn:
        chunk, size = row.chunk, self.pool.block_size
        if row.is_broken and chunk.is_wanted:
            self._spoil(row.blocks)
            return None
        before = self._read(row.blocks, chunk.start)
        for position, token in enumerate(row.tokens, chunk.start):
            if token is None:
                drawn = self._drawn[chunk.sequence]
                assert not isinstance(drawn, list), "a beam goes on before it is known with what"
                token = drawn
            before.append(GARBAGE if token is None or row.is_broken else state(before, token))
            if chunk.stores:
                self.slots[row.blocks[position // size]][position % size] = before[-1]
        if row.is_broken or not chunk.draws:
            return None
        sequence = chunk.sequence
        return likeliest(before[-1], sequence.candidates) if sequence.candidates else draw(before[-1], sequence.choice)

    def _read(self, blocks: Tokens[int], count: int) -> list[int]:
        size = self.pool.block_size
        return [self.slots[blocks[p // size]][p % size] for p in range(count)]

    def held(self, sequence: Sequence) -> list[int]:
        """What the slots hold of which it is known that they are computed."""
        return self._read(sequence.table.blocks, sequence.computed)

    def spoil(self, sequence: Sequence) -> None:
        """Fill all that a sequence holds, the pinned blocks apart, with garbage."""
        self._spoil(sequence.table.blocks)

    def _spoil(self, blocks: Tokens[int]) -> None:
        for block in set(blocks) - self.pool.pinned:
            self.slots[block] = [GARBAGE] * self.pool.block_size


def take_step(scheduler: Scheduler, model: FakeModel, limits: dict[int, int], broken: int = 0) -> Step:
    """One step from its schedule to its tokens. `limits` has the length at which each sequence ends."""
    step = scheduler.schedule()
    for sequence in step.exhausted:
        scheduler.end(sequence, "length")
    deliver(model.launch(step, broken), scheduler, model, limits)
    return step


def deliver(
    flight: FakeFlight,
    scheduler: Scheduler,
    model: FakeModel,
    limits: dict[int, int],
    fail: Callable[[Sequence], object] | None = None,
    copies: Collection[tuple[int, int]] = (),
    take: Callable[[Sequence, Candidates], object] | None = None,
) -> list[Chunk]:
    """Read a step, end whom it fails, publish it, and hand out its tokens.

    Args:
        take: is given what a beam could go on with.
        copies: those of the step that was launched meanwhile.

    Returns:
        The chunks that counted.
    """
    step, drawn = flight.step, model.read(flight)
    broken = [row.chunk.sequence for row in flight.rows if row.is_broken and row.chunk.is_wanted]
    culprits, _ = scheduler.distrust(broken, copies)
    for sequence in culprits:
        if sequence.state == "done":  # it has failed with another beam
            continue
        if fail:
            fail(sequence)
        else:
            scheduler.fail(sequence, "error")
    counted = [chunk for chunk in step.chunks if chunk.is_wanted]
    scheduler.finish(step)
    for chunk, token in zip(step.chunks, drawn, strict=True):
        sequence = chunk.sequence
        if token is None or not chunk.is_wanted:
            continue
        if isinstance(token, list):
            assert take, "a beam that nobody expects"
            take(sequence, token)
        else:
            sequence.tokens.append(token)
            if len(sequence.tokens) == limits[sequence.id]:
                scheduler.end(sequence, "length")
    return counted


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
