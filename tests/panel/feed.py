"""Serve the panel on a pool that is real and visitors that are not: `python tests/panel/feed.py --port 7870`.

For work on the panel without a model. The page at /?me shows the first visitor as the viewer. With --beams its turns
are beam searches, with --replies they have several replies, of which one is chosen after a while.
"""

import argparse
import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.cache.table import BlockTable
from chatpage.events import Event, EventLog, Snapshot

SYSTEM_TEXT = (
    "<|system|>\nYou are ChatPage, a small assistant that explains paged attention . You answer in short , "
    "plain sentences , and you say so when you do not know something . The page beside you shows your own memory : "
    "the KV cache , cut into blocks . Point at a block to see who reads it . Every visitor of this page shares the "
    "blocks of this text , which were computed once , when the server started . <|end|>\n"
)
QUESTIONS = [
    "What is a block table ?",
    "Why is one reservation for each sequence a waste of memory ?",
    "When does copy-on-write happen ?",
    "What does the number on a shared block mean ?",
]
ANSWERS = [
    "A block table maps the logical blocks of a sequence to physical blocks of the pool . Logical block 0 holds the "
    "first tokens , block 1 the next ones , and so on . The physical blocks may lie anywhere , so memory is taken one "
    "block at a time , when it is needed , and nothing has to be reserved in advance .",
    "Nobody knows how long an answer will be . A contiguous cache has to reserve room for the longest one . Most "
    "answers are short , so most of that room is never written , and nobody else can use it meanwhile .",
    "When a sequence wants to write into a block that others read as well . It gets a copy of this one block first , "
    "and writes there . The others go on reading the old one .",
]
TOKEN = "viewer"


class Words:
    """A toy tokenizer: a token is a word with the space before it."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        pieces = [piece for word in text.split(" ") for piece in (" " + word).split("\n") if piece]
        return [self._id(piece) for piece in pieces]

    def _id(self, piece: str) -> int:
        if piece not in self.ids:
            self.ids[piece] = len(self.texts)
            self.texts.append(piece)
        return self.ids[piece]


class Visitor:
    def __init__(self, house: "House", session: int) -> None:
        self.house, self.session = house, session
        self.table = BlockTable(house.pool, session, f"session {session}", len(house.system))
        self.tokens: list[int] = list(house.system)
        self.answer: list[int] = []
        self.wait = 0
        self.turns = house.random.randrange(1, 5)
        self.state("queued", "arrival")

    def state(self, state: str, reason: str) -> None:
        self.house.log.emit("state", reason, sequence=self.session, session=self.session, state=state)

    def step(self) -> bool:
        """One step of this visitor. False: it left."""
        if self.wait:
            self.wait -= 1
        elif self.answer:
            self.take([self.answer.pop(0)])
            if not self.answer:
                self.rest()
        elif self.turns:
            self.turns -= 1
            self.say()
        else:
            self.leave()
            return False
        return True

    def say(self) -> None:
        words, chance = self.house.words, self.house.random
        self.state("prefill", "turn")
        said = words.encode(f"<|user|>\n{chance.choice(QUESTIONS)} <|assistant|>\n")
        if not self.table.blocks:
            self.table.find(self.tokens)
        self.take(said)
        self.state("decode", "prompt is read")
        self.answer = words.encode(chance.choice(ANSWERS))

    def take(self, tokens: list[int]) -> None:
        self.tokens += tokens
        try:
            self.table.append(len(self.tokens) - self.table.length)
        except PoolFull:
            del self.tokens[-len(tokens) :]
            self.answer = []
            self.house.log.emit("preempt", "pool is full", sequence=self.session, session=self.session)
            self.table.release("preempted")
            return
        self.table.publish(self.tokens, self.table.length)

    def rest(self) -> None:
        self.table.publish(self.tokens, self.table.length, tail=True)
        self.state("resting", "turn ended")
        self.wait = self.house.random.randrange(20, 200)

    def leave(self) -> None:
        self.table.release("session ended")
        self.house.log.emit("end", "session ended", sequence=self.session)


class Searcher(Visitor):
    """A visitor whose answers are many at once: beams, which fork and are dropped at any step, or replies."""

    def __init__(self, house: "House", session: int) -> None:
        self.others: dict[int, tuple[BlockTable, list[int]]] = {}  # sequence -> its table and tokens
        super().__init__(house, session)

    def step(self) -> bool:
        if self.others and not self.answer and self.wait < 20:
            self.choose()
        return super().step()

    def say(self) -> None:
        if len(self.tokens) > self.house.options.blocks * self.house.options.block_size // 8:  # a new chat
            self.table.release("new chat")
            self.tokens = list(self.house.system)
        super().say()
        for _ in range(1, self.house.options.replies):
            self.fork(self.table, self.tokens)

    def fork(self, table: BlockTable, tokens: list[int]) -> None:
        self.house.next_fork += 1
        sequence = self.house.next_fork
        self.others[sequence] = (table.fork(sequence, table.length, session=self.session), tokens[:])

    def drop(self, sequence: int, reason: str) -> None:
        table, _ = self.others.pop(sequence)
        table.release(reason)
        self.house.log.emit("end", reason, sequence=sequence)

    def take(self, tokens: list[int]) -> None:
        """The first beam goes on as the text says, the others with a word of their own each."""
        chance = self.house.random
        if self.answer and self.house.options.beams:
            self.move_on()
        super().take(tokens)
        for table, said in self.others.values():
            said.append(chance.randrange(len(self.house.words.texts)))
            with contextlib.suppress(PoolFull):
                table.append(len(said) - table.length)
                table.publish(said, table.length)

    def move_on(self) -> None:
        """Beams fork; as many as are too many are dropped."""
        chance, width = self.house.random, self.house.options.beams
        for _ in range(chance.choice([0, 0, 1, 2]) if self.others else width - 1):
            table, tokens = chance.choice([(self.table, self.tokens), *self.others.values()])
            self.fork(table, tokens)
        while len(self.others) >= width:
            self.drop(chance.choice(list(self.others)), "a likelier beam went on")

    def rest(self) -> None:
        super().rest()
        self.wait = max(self.wait, 80)
        for sequence, (table, tokens) in self.others.items():
            table.publish(tokens, table.length, tail=True)
            self.house.log.emit("state", "turn ended", sequence=sequence, session=self.session, state="resting")

    def choose(self) -> None:
        for sequence in list(self.others):
            self.drop(sequence, "another reply was chosen")

    def leave(self) -> None:
        for sequence in list(self.others):
            self.drop(sequence, "session ended")
        super().leave()


class House:
    """The pool, its visitors, and everybody who watches."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.words = Words()
        self.system = self.words.encode(SYSTEM_TEXT)
        self.start()

    def start(self) -> None:
        self.log = EventLog()
        size, blocks = self.options.block_size, self.options.blocks
        self.pool = BlockPool(blocks, size, self.log)
        self.mirror = Snapshot.empty(
            self.log, block_size=size, num_blocks=blocks, bytes_per_block=size * 28_672, max_model_len=4096
        )
        self.fresh: list[Event] = []
        self.log.listeners += [self.mirror.apply, self.fresh.append]
        self.viewers: set[asyncio.Queue[str]] = set()
        self.visitors: list[Visitor] = []
        self.next, self.next_fork = 1, 1000
        self._pin_system()

    def _pin_system(self) -> None:
        self.log.emit("state", "start", sequence=0, session=0, state="prefill")
        table = BlockTable(self.pool, 0, "system", len(self.system))
        table.append(len(self.system))
        table.publish(self.system, len(self.system), tail=True)
        for logical, block in enumerate(table.blocks):
            self.pool.pin(block, logical=logical, at=len(self.system), name="default")
        table.release("prefilled")
        self.log.emit("end", "prefilled", sequence=0)

    def arrive(self) -> None:
        first = self.next == 1
        searches = first and (self.options.beams or self.options.replies > 1)
        self.visitors.append((Searcher if searches else Visitor)(self, self.next))
        self.visitors[-1].turns += 1000 * first
        self.next += 1

    def step(self) -> None:
        if len(self.visitors) < self.options.sessions and self.random.random() < 0.3:
            self.arrive()
        self.visitors = [visitor for visitor in self.visitors if visitor.step()]
        if self.random.random() < 0.002 and len(self.visitors) > 1:
            self.visitors.pop(self.random.randrange(1, len(self.visitors))).leave()
        self.tell()

    def tell(self) -> None:
        if not self.fresh:
            return
        body = {
            "seq": [self.fresh[0].seq, self.fresh[-1].seq],
            "time": 0,
            "events": [event.to_json() for event in self.fresh],
        }
        message = self.message("delta", body)
        self.fresh.clear()
        for queue in self.viewers:
            queue.put_nowait(message)

    def message(self, kind: str, body: dict[str, Any]) -> str:
        return f"id: {self.log.epoch}-{self.log.seq}\nevent: {kind}\ndata: {json.dumps(body)}\n\n"

    async def run(self) -> None:
        for _ in range(self.options.skip):
            self.step()
        while True:
            self.step()
            await asyncio.sleep(1 / self.options.speed)

    async def events(self, request: Request) -> Response:
        async def stream() -> AsyncIterator[str]:
            queue: asyncio.Queue[str] = asyncio.Queue()
            self.viewers.add(queue)
            try:
                yield self.message("snapshot", self.mirror.to_json(scope="full", sharing="all"))
                while True:
                    yield await queue.get()
            finally:
                self.viewers.discard(queue)

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def me(self, request: Request) -> Response:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}" or not self.visitors:
            return JSONResponse({"error": {"message": "unknown view token"}}, 401)
        mine, size = self.visitors[0], self.options.block_size
        held = {mine.session: (mine.table, mine.tokens), **(mine.others if isinstance(mine, Searcher) else {})}
        sequences = [
            {
                "id": sequence,
                "tokens": [
                    {"text": self.words.texts[token], "block": table.blocks[i // size], "slot": i % size}
                    for i, token in enumerate(tokens[: table.length])
                ],
            }
            for sequence, (table, tokens) in held.items()
        ]
        return JSONResponse({"session": mine.session, "sequences": sequences})

    async def snapshot(self, request: Request) -> Response:
        return JSONResponse(self.mirror.to_json(scope="full", sharing="all"))

    async def restart(self, request: Request) -> Response:
        self.start()
        return JSONResponse({"epoch": self.log.epoch})


def page(request: Request) -> Response:
    """The panel in a column as wide as beside a chat, `?n=2` times."""
    viewer = f'window.chatpageViewer = {{token: "{TOKEN}", session: 1}}' if "me" in request.query_params else ""
    columns = int(request.query_params.get("n", 1))
    return HTMLResponse(
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<meta name=color-scheme content='light dark'><title>panel</title><link rel=icon href='data:,'>"
        f"<body style='margin:16px;display:flex;gap:16px;flex-wrap:wrap'>{'<div class=root></div>' * columns}"
        "<style>.root{width:min(600px,100%)}</style>"
        f"<script>{viewer}</script><script type=module>import {{mount}} from './panel/panel.js';"
        "document.querySelectorAll('.root').forEach(e => mount(e))</script>"
    )


def create_app(options: argparse.Namespace) -> Starlette:
    house = House(options)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(house.run())
        yield
        task.cancel()

    static = Path(__file__).parents[2] / "static"
    routes = [
        Route("/", page),
        Route("/kv/events", house.events),
        Route("/kv/me", house.me),
        Route("/kv/snapshot", house.snapshot),
        Route("/restart", house.restart),
        Mount("/panel", StaticFiles(directory=static, html=True)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {
        "port": 7870,
        "blocks": 256,
        "block-size": 16,
        "sessions": 6,
        "speed": 20,
        "skip": 0,
        "seed": 1,
        "beams": 0,
        "replies": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    uvicorn.run(create_app(options), port=options.port, log_level="warning", timeout_graceful_shutdown=1)
