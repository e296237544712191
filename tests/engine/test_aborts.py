"""Two thousand requests aborted at every stage, beside fifty that are not, which say what they say in peace."""

import itertools
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from chatpage.engine import Engine
from chatpage.model.batch import Drawn, Row
from chatpage.schedule.request import Delta
from chatpage.stream import Stream
from tests.engine.harness import ask, blocks, greedy, inside, intercept, paused, read

pytestmark = pytest.mark.usefixtures("overlaps")

KINDS = ["queued", "prefilling", "decoding", "between copy and write"]
WAVES, OF_EACH_KIND = 25, 20
LONG = "The system prompt is shared by all the sessions, and so is whatever they ask in the same words. "
BROKEN = 666  # the seed of requests that fail whenever they run


class Nemesis:
    """Aborts requests, and looks at what they were doing at that moment.

    Attributes:
        aborted: how many, by what they were doing.
        raised: how many steps raised between copy and write.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.aborted: Counter[str] = Counter()
        self.raised = 0
        self._random = Random(0)
        self._wanted: set[Stream] = set()  # to be cancelled between copy and write
        self._caught: set[Stream] = set()
        self._targets: set[int] = set()  # of the copies of this step, until its rows run
        core = engine.core
        self._copy, self._cancel = core.runner.copy, core.cancel
        core.runner.copy, core.cancel = self.copy, self.cancel
        intercept(core.runner, self.run)

    def ask(self, kind: str, text: str, after: int) -> Stream:
        """A request that is aborted while it is as `kind` says; a decode after so many tokens."""
        is_due = {
            "queued": lambda delta: delta.state == "queued",
            "prefilling": lambda delta: delta.state in ("prefill", "decode"),
            "decoding": lambda delta: delta.completion_tokens == after,
            "between copy and write": lambda delta: delta.completion_tokens == 30,  # it had no copy
        }[kind]

        def hear(delta: Delta) -> None:
            if is_due(delta):
                stream.cancel()

        session = self.engine.open_session() if self._random.random() < 0.5 else None
        stream = ask(self.engine, text, greedy(40), session=session, listener=hear)
        if kind == "between copy and write":
            self._wanted.add(stream)
        if kind == "queued" and self._random.random() < 0.5:
            stream.cancel()  # before it was even heard that it came
        return stream

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        self._copy(pairs)
        self._targets = {target for _, target in pairs}

    def run(self, rows: list[Row], compute: Callable[[list[Row]], list[Drawn]]) -> list[Drawn]:
        targets, self._targets = self._targets, set()
        copied = [row.table for row in rows if targets.intersection(row.table)]
        due = {
            s for t in self.engine.core.turns.values() if t.sequences[0].table.blocks in copied for s in t.streams
        } & self._wanted
        for stream in due:
            stream.cancel()
        self._wanted -= due
        self._caught |= due
        if due and self._random.random() < 0.5:
            self.raised += 1
            raise RuntimeError("between copy and write")  # once: it runs again in halves
        if any(row.sample is not None and row.sample.seed == BROKEN for row in rows):
            raise RuntimeError("whenever it runs")
        return compute(rows)

    def cancel(self, stream: Stream) -> None:
        sequence = next((t.sequences[0] for t in self.engine.core.turns.values() if stream in t.streams), None)
        if sequence is not None:
            doing = "decoding" if sequence.generated else "prefilling" if sequence.table.blocks else "queued"
            self.aborted["between copy and write" if stream in self._caught else doing] += 1
        self._cancel(stream)


@pytest.mark.parametrize("sharing", ["system", "all"])
def test_an_abort_disturbs_nobody_and_leaves_nothing(launch: Callable[..., Engine], sharing: str) -> None:
    engine = launch(sharing=sharing, max_sequences=16, max_queue=200, max_step_tokens=48, kv_blocks=200)
    questions = [f"{n % 30} {LONG}"[: 10 + 2 * n] for n in range(50)]
    with paused(engine):
        quiet = [ask(engine, question) for question in questions]
    expected = [(answer.tokens, answer.text) for answer in map(read, quiet)]
    baseline = blocks(engine)
    assert baseline["used"] == baseline["pinned"] > 0

    nemesis, numbers, kept = Nemesis(engine), itertools.count(), []
    for wave in range(WAVES):
        with paused(engine):
            aborted = []
            for kind in KINDS * OF_EACH_KIND:
                number = next(numbers)
                head = f"{number} " if kind == "between copy and write" else f"{number % 30} "
                said = LONG * 3 if kind == "prefilling" else LONG[: 20 + number % 70]
                aborted.append(nemesis.ask(kind, head + said, after=1 + number % 5))
                if len(aborted) % 40 == 7:
                    kept.append(ask(engine, questions[len(kept)]))
            broken = ask(engine, f"{wave} breaks", greedy(seed=BROKEN))
        assert read(broken).reason == "error"
        assert {read(stream).reason for stream in aborted} == {"abort"}
    assert [(answer.tokens, answer.text) for answer in map(read, kept)] == expected

    assert set(nemesis.aborted) == set(KINDS)
    assert min(nemesis.aborted.values()) >= 200, nemesis.aborted
    assert sum(nemesis.aborted.values()) >= 2000
    assert nemesis.raised >= 50
    for key in list(engine._sessions._by_key):
        engine.close_session(key)
    inside(engine, lambda: None)
    after = blocks(engine)
    assert after["used"] == after["pinned"] == baseline["pinned"]
    assert after["free"] + after["idle"] == baseline["free"] + baseline["idle"]
    assert (sum(engine.core.pool.ref), engine.core.view.sessions, engine.core.turns) == (0, {}, {})
