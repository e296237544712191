"""Random operations on a small pool, checked against the naive model after every one of them."""

from collections import Counter
from collections.abc import Callable, Hashable
from random import Random
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.cache.prefix import SYSTEM
from chatpage.cache.table import BlockTable
from chatpage.events import FREE, IDLE, USED, Event, EventLog, Snapshot
from tests.cache.naive import LiveSequence, Memory, Published, deep_state, longest

# Three tokens only, and mostly one of them, so that prefixes of strangers collide all the time.
TOKENS = st.sampled_from([0, 0, 0, 1, 2])
SHORT = st.lists(TOKENS, min_size=1, max_size=9)
DOMAINS = st.sampled_from(["a", "b"])
MOST = 4  # sequences at a time: with more, a small pool is full before anything happens
WHO = st.integers(0, MOST - 1)
BACK = st.integers(0, 7)  # tokens from the end of a sequence


class CacheMachine(RuleBasedStateMachine):
    """Drives a pool as the scheduler does: slots are asked for, then copied, then written, then published."""

    @initialize(
        num_blocks=st.integers(6, 12),
        block_size=st.integers(1, 4),
        systems=st.lists(st.lists(TOKENS, min_size=1, max_size=7), min_size=2, max_size=2),
    )
    def start(self, num_blocks: int, block_size: int, systems: list[list[int]]) -> None:
        self.events = EventLog()
        self.pool = BlockPool(num_blocks, block_size, self.events)
        self.memory = Memory(num_blocks, block_size)
        self.published = Published(self.memory)
        self.idle: list[int] = []  # longest idle first
        self.snapshot = Snapshot.empty(self.events, block_size=block_size, num_blocks=num_blocks)
        self.events.listeners.append(self.hear)
        self.systems = systems
        self.pinned: dict[str, list[int]] = {}
        self.live: dict[int, LiveSequence] = {}
        self.resting: set[int] = set()  # sequences
        self.ids = 0
        self.copies = self.hits = 0
        self.ends = False  # whether a turn is just being ended

    # -- events, heard as they come -------------------------------------------------------------------------------

    def hear(self, event: Event) -> None:
        assert event.kind != "release" or event.ref >= 0, f"block {event.block} is released once too often"
        self.snapshot.apply(event)
        if event.kind == "publish":
            assert self.ends or event.fill == self.pool.block_size, "the tail of a turn that goes on is published"
            self.published.add(event, self.live[event.sequence])
        elif event.kind in ("unpublish", "evict"):
            self.published.remove(event.block)
        if event.kind == "evict" and event.reason == "least recently used":
            assert event.block == self.idle[0], f"evicts {event.block}, but idle since longest are {self.idle}"
        if event.kind in ("evict", "share", "pin") and event.block in self.idle:
            self.idle.remove(event.block)
        if event.kind == "release" and event.becomes == "idle":
            self.idle.append(event.block)

    # -- what a sequence does -------------------------------------------------------------------------------------

    def enter(self, table: BlockTable, session: int) -> LiveSequence:
        sequence = LiveSequence(table, session)
        self.live[table.sequence] = sequence
        return sequence

    def open(self, domain: Hashable, system_tokens: int) -> LiveSequence:
        self.ids += 1
        self.events.emit("state", "new", sequence=self.ids, session=self.ids, state="queued")
        return self.enter(BlockTable(self.pool, self.ids, domain, system_tokens), session=self.ids)

    def close(self, sequence: LiveSequence) -> None:
        sequence.table.release()
        before = deep_state(self.pool, self.live.values())
        sequence.table.release()
        assert deep_state(self.pool, self.live.values()) == before, "the second release did something"
        del self.live[sequence.id]
        self.events.emit("end", "end", sequence=sequence.id)

    def find(self, sequence: LiveSequence, tokens: list[int]) -> None:
        table = sequence.table
        most, least = longest(self.pool, tokens, table.domain, table.system_tokens)
        found = table.find(tokens)
        assert least <= found <= most, f"found {found} tokens, not {least} to {most}"
        self.hits += found
        sequence.tokens = tokens[:found]
        self.check_isolation(table)

    def catch_up(self, sequence: LiveSequence, tokens: list[int]) -> None:
        """Find what is there and compute the rest, if there is room for it."""
        self.find(sequence, tokens)
        rest = tokens[len(sequence.tokens) :]
        if rest:
            self.grow([(sequence, rest)])

    def ask(self, domain: Hashable, system_tokens: int, prompt: list[int]) -> LiveSequence:
        sequence = self.open(domain, system_tokens)
        self.catch_up(sequence, prompt)
        return sequence

    def check_isolation(self, table: BlockTable) -> None:
        for logical, block in enumerate(table.blocks):
            domain = self.published.domain[block]
            if domain != table.domain:
                end = min(table.length, (logical + 1) * self.pool.block_size)
                assert domain == SYSTEM, f"{table.domain} found a block of {domain}"
                assert end <= table.system_tokens, f"token {end} found behind a prompt of {table.system_tokens}"

    def grow(self, wishes: list[tuple[LiveSequence, list[int]]]) -> list[LiveSequence]:
        """One step: slots for all who get some, then the copies, then the writes. Returns who got none."""
        granted, refused, copies = [], [], []
        for sequence, tokens in wishes:
            if self.reserve(sequence, len(tokens), copies):
                granted.append((sequence, sequence.table.length - len(tokens)))
                sequence.tokens = sequence.tokens + tokens
            else:
                refused.append(sequence)
        self.memory.copy(copies)
        written = set()
        for sequence, start in granted:
            slots = self.memory.write(sequence.table.blocks, sequence.tokens, start)
            assert written.isdisjoint(slots), f"{slots} are written twice in one step"
            written.update(slots)
        for block, _ in written:
            assert self.pool.ref[block] == 1, f"block {block} is written under {self.pool.ref[block]} references"
            assert block not in self.published.content, f"block {block} is written while it can be found"
            assert block not in self.pool.pinned, f"block {block} is written although it is pinned"
        return refused

    def reserve(self, sequence: LiveSequence, count: int, copies: list[tuple[int, int]]) -> bool:
        """Append as the write rule says, or not at all."""
        table, size = sequence.table, self.pool.block_size
        more = -(-(table.length + count) // size) - len(table.blocks)
        copy = table.length % size != 0 and self.wants_copy(table.blocks[-1], more)
        room = self.pool.available
        before = deep_state(self.pool, self.live.values())
        try:
            pair = table.append(count)
        except PoolFull:
            assert room < more + copy, f"refused {more + copy} blocks of {room}"
            assert deep_state(self.pool, self.live.values()) == before, "a refusal changed something"
            return False
        assert room >= more + copy, f"gave {more + copy} blocks of {room}"
        assert (pair is not None) == copy, f"copied {pair}, expected {copy}"
        if pair is not None:
            copies.append(pair)
            self.copies += 1
        return True

    def wants_copy(self, block: int, more: int) -> bool:
        holders = sum(block in other.table.blocks for other in self.live.values())
        if holders > 1 or any(block in table for table in self.pinned.values()):
            return True
        is_full = len(self.published.content.get(block, [])) == self.pool.block_size
        return is_full and self.pool.available > more  # else it gives up its old content, to have room

    # -- rules ----------------------------------------------------------------------------------------------------

    def pick(self, who: int) -> LiveSequence | None:
        live = list(self.live.values())
        return live[who % len(live)] if live else None

    @rule(domain=DOMAINS, which=st.integers(-2, 1), known=st.booleans(), rest=SHORT, publish=st.booleans())
    def arrive(self, domain: str, which: int, known: bool, rest: list[int], publish: bool) -> None:
        """A prompt: behind an operator's system prompt, behind the same text but private, or without any."""
        if len(self.live) == MOST:
            self.close(next(iter(self.live.values())))
        system = self.systems[which] if which >= 0 else []
        sequence = self.ask(domain, len(system) if known else 0, system + rest)
        if publish:
            self.publish_all(sequence)

    @rule(domain=DOMAINS, prompt=SHORT)
    def twins(self, domain: str, prompt: list[int]) -> None:
        """Two compute the same before either can find it at the other: of equal blocks only one is published."""
        if len(self.live) <= MOST - 2:
            for twin in [self.ask(domain, 0, prompt), self.ask(domain, 0, prompt)]:
                self.publish_all(twin)

    @rule(who=WHO, tokens=SHORT, publish=st.booleans())
    def append(self, who: int, tokens: list[int], publish: bool) -> None:
        if sequence := self.pick(who):
            self.grow([(sequence, tokens)])
            if publish:
                self.publish_all(sequence)

    @rule(wishes=st.lists(SHORT, min_size=2, max_size=MOST))
    def step(self, wishes: list[list[int]]) -> None:
        self.grow(list(zip(self.live.values(), wishes, strict=False)))

    @rule(who=WHO, spare=st.integers(1, 3))
    def ask_too_much(self, who: int, spare: int) -> None:
        if sequence := self.pick(who):
            count = (self.pool.available + spare) * self.pool.block_size
            assert self.grow([(sequence, [0] * count)]) == [sequence], "more was given than there is"

    @rule(who=WHO, back=BACK, tokens=st.lists(TOKENS, max_size=9), ends=st.booleans())
    def fork(self, who: int, back: int, tokens: list[int], ends: bool) -> None:
        """A branch that begins some tokens back from the end, may go on with others, and may end at once."""
        parent = self.pick(who)
        if parent and len(self.live) < MOST:
            at = max(0, len(parent.tokens) - back)
            self.ids += 1
            child = self.enter(parent.table.fork(self.ids, at, session=parent.session), parent.session)
            self.resting |= {child.id} if parent.id in self.resting else set()
            child.tokens = parent.tokens[:at]
            if tokens:
                self.grow([(child, tokens)])
                self.publish_all(child)
            if ends:
                self.publish_all(child, tail=True)
                self.close(child)

    @rule(who=WHO, back=BACK)
    def publish(self, who: int, back: int) -> None:
        if sequence := self.pick(who):
            computed = max(0, len(sequence.tokens) - back)
            sequence.table.publish(sequence.tokens, computed)
            self.expect_found(sequence, computed - computed % self.pool.block_size)

    @rule(who=WHO)
    def rest(self, who: int) -> None:
        if sequence := self.pick(who):
            self.publish_all(sequence, tail=True)
            self.events.emit("state", "turn ended", sequence=sequence.id, session=sequence.session, state="resting")
            self.resting.add(sequence.id)

    def publish_all(self, sequence: LiveSequence, *, tail: bool = False) -> None:
        length = len(sequence.tokens)
        self.ends = tail
        sequence.table.publish(sequence.tokens, length, tail=tail)
        self.ends = False
        self.expect_found(sequence, length if tail else length - length % self.pool.block_size)

    def expect_found(self, sequence: LiveSequence, count: int) -> None:
        """What was published can be found, unless an eviction cut it off or a block is the system prompt's tail."""
        table, size = sequence.table, self.pool.block_size
        pinned = [len(self.published.content[b]) if b in self.pool.pinned else size for b in table.blocks]
        is_tail = any(held < min(size, count - i * size) for i, held in enumerate(pinned))
        if table._node.block and not is_tail:
            most, _ = longest(self.pool, sequence.tokens, table.domain, table.system_tokens)
            assert most >= count, f"only {most} of {count} published tokens can be found"

    @rule(who=WHO, back=BACK)
    def truncate(self, who: int, back: int) -> None:
        if sequence := self.pick(who):
            length = max(0, len(sequence.tokens) - back)
            sequence.table.truncate(length)
            sequence.tokens = sequence.tokens[:length]

    @rule(who=WHO)
    def preempt_and_resume(self, who: int) -> None:
        if sequence := self.pick(who):
            self.events.emit("preempt", "pool full", sequence=sequence.id, session=sequence.session)
            sequence.table.release("preempt")
            self.resting.discard(sequence.id)
            self.catch_up(sequence, sequence.tokens)

    @rule(who=WHO)
    def release(self, who: int) -> None:
        if sequence := self.pick(who):
            self.close(sequence)

    @rule()
    def all_leave(self) -> None:
        """Only what can be found or is pinned is left."""
        for sequence in list(self.live.values()):
            self.close(sequence)
        assert self.snapshot.sessions == {}
        assert self.pool.available == self.pool.num_blocks - len(self.pool.pinned)

    @rule(blocks=st.integers(1, 12))
    def press(self, blocks: int) -> None:
        """A stranger takes that many blocks for a moment, and idle ones are evicted."""
        blocks = min(blocks, self.pool.available)
        if blocks:
            stranger = self.open("stranger", 0)
            assert self.grow([(stranger, [2] * (blocks * self.pool.block_size))]) == []
            self.close(stranger)

    @rule(which=st.integers(0, 1))
    def pin(self, which: int) -> None:
        prompt, name = self.systems[which], str(which)
        if name in self.pinned:
            return
        first = self.ask(SYSTEM, len(prompt), prompt)
        if first.tokens == prompt:
            self.ends = True
            first.table.publish(prompt, len(prompt), tail=True)
            self.ends = False
            for logical, block in enumerate(first.table.blocks):
                self.pool.pin(block, logical=logical, at=len(prompt), name=name)
            self.pinned[name] = list(first.table.blocks)
        self.close(first)

    # -- after every operation ------------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        self.pool_is_sound()
        self.every_token_is_where_the_table_says()
        self.published_content_never_changes()
        self.tree_spells_what_the_blocks_hold()
        self.pinned_prompts_can_be_found_whole()
        self.replayed_events_give_the_state()
        self.counts_are_right()

    def pool_is_sound(self) -> None:
        self.pool.check([sequence.table for sequence in self.live.values()])

    def every_token_is_where_the_table_says(self) -> None:
        for sequence in self.live.values():
            table = sequence.table
            assert table.length == len(sequence.tokens)
            held = self.memory.read(table.blocks, table.length)
            assert held == self.memory.spell(sequence.tokens), f"sequence {sequence.id} reads {held}"

    def published_content_never_changes(self) -> None:
        assert set(self.published.content) == {b for b, node in enumerate(self.pool.node) if node is not None}
        for block, content in self.published.content.items():
            assert self.memory.slots[block][: len(content)] == content, f"published block {block} was overwritten"

    def tree_spells_what_the_blocks_hold(self) -> None:
        spelt: dict[int, int] = {-1: 0}
        for node in self.pool.tree.root.descendants():
            assert node.parent is not None
            numbers = self.memory.spell(node.tokens, spelt[node.parent.block])
            spelt[node.block] = numbers[-1]
            assert self.published.content[node.block] == numbers, f"block {node.block} holds something else"
            assert all(node.parent.children.values()), "the tree keeps empty branches"

    def pinned_prompts_can_be_found_whole(self) -> None:
        for name in self.pinned:
            prompt = self.systems[int(name)]
            found = self.pool.tree.find(prompt, "visitor", len(prompt))
            assert sum(length for _, length in found) == len(prompt), f"system prompt {name} is not found whole"

    def replayed_events_give_the_state(self) -> None:
        shown, pool = self.snapshot, self.pool
        pinned = {block for table in self.pinned.values() for block in table}
        used = {block for sequence in self.live.values() for block in sequence.table.blocks} | pinned
        states = [USED if b in used else IDLE if b in self.idle else FREE for b in range(pool.num_blocks + 1)]
        assert (list(shown.ref), list(shown.fill), list(shown.state)) == (pool.ref, pool.fill, states)
        assert {name: system.table for name, system in shown.system.items()} == self.pinned
        tables = {s.id: (s.table, s.tokens) for session in shown.sessions.values() for s in session.sequences.values()}
        assert tables == {s.id: (list(s.table.blocks), len(s.tokens)) for s in self.live.values()}

    def counts_are_right(self) -> None:
        counts, counters = self.snapshot.counts(), self.snapshot.counters
        pinned = {block for table in self.pinned.values() for block in table}
        resting = {block for s in self.live.values() if s.id in self.resting for block in s.table.blocks}
        awake = {block for s in self.live.values() if s.id not in self.resting for block in s.table.blocks}
        holders = [sum(b in s.table.blocks for s in self.live.values()) for b in range(self.pool.num_blocks + 1)]
        assert counts == {
            "free": self.pool.num_blocks - len(resting | awake | pinned) - len(self.idle),
            "idle": len(self.idle),
            "used": len(resting | awake | pinned),
            "shared": sum(n >= 2 for n in holders),
            "pinned": len(pinned),
            "resting": len(resting - awake - pinned),
        }
        assert counters["allocated"] - counters["freed"] == counts["used"] + counts["idle"]
        assert (counters["copied"], counters["hit_tokens"]) == (self.copies, self.hits)


# -- the same without Hypothesis: it cannot make a failure small, but walks several times as far in the same time ------


def walk(seed: int, steps: int = 60, counts: Counter[str] | None = None) -> int:
    """A random walk of the machine, checked after every step; the seed is all that makes it.

    Args:
        counts: how often each rule ran is added to it.

    Returns:
        How many operations were checked.
    """
    random = Random(seed)
    counts = Counter() if counts is None else counts

    def tokens(most: int = 9) -> list[int]:
        return random.choices([0, 1, 2], [3, 1, 1], k=random.randint(1, most))

    def back() -> int:
        return random.randint(0, 7)

    def flip() -> bool:
        return random.random() < 0.5

    machine = CacheMachine()
    machine.start(random.randint(6, 12), random.randint(1, 4), [tokens(7), tokens(7)])
    rules: dict[str, Callable[[int], Any]] = {
        "arrive": lambda _: machine.arrive(random.choice("ab"), random.randint(-2, 1), flip(), tokens(), flip()),
        "twins": lambda _: machine.twins(random.choice("ab"), tokens()),
        "append": lambda who: machine.append(who, tokens(), flip()),
        "step": lambda _: machine.step([tokens() for _ in range(random.randint(2, MOST))]),
        "ask_too_much": lambda who: machine.ask_too_much(who, random.randint(1, 3)),
        "fork": lambda who: machine.fork(who, back(), tokens() if flip() else [], flip()),
        "publish": lambda who: machine.publish(who, back()),
        "rest": lambda who: machine.rest(who),
        "truncate": lambda who: machine.truncate(who, back()),
        "preempt_and_resume": lambda who: machine.preempt_and_resume(who),
        "release": lambda who: machine.release(who),
        "all_leave": lambda _: machine.all_leave(),
        "press": lambda _: machine.press(random.randint(1, 12)),
        "pin": lambda _: machine.pin(random.randint(0, 1)),
    }
    favours = [random.random() ** 2 for _ in rules]  # each walk likes some rules better than others
    for name in random.choices(list(rules), favours, k=steps):
        rules[name](random.randrange(MOST))
        machine.all_is_well()
        counts[f"cache {name}"] += 1
    return steps
