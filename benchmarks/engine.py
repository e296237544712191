"""The whole engine on a GPU: sessions behind a shared system prompt, beside limits, goals and transformers.

    python -m benchmarks.engine                          both shapes, all questions
    python -m benchmarks.engine --shape 0.6b --only speed first
    python -m benchmarks.engine --only http
    python -m benchmarks.engine --only peers             ours, `generate` and `generate_batch`; slow
    python -m benchmarks.engine --only profile           where the GPU's time goes in a step
    python -m benchmarks.engine --shape tiny             tries this program on a CPU

Shapes of Qwen3-0.6B and Qwen3-8B with random weights, made on the GPU, and the bundled tokenizer; greedy; a question of
128 tokens and an answer of 128 behind a system prompt of 2,048, so that a session has about 192 tokens of its own
on average (*own* says how many). No answer ends early. Settings are the defaults, except for the size of the pool, and
of a step where nothing is shared.

*Tokens/s* is wall time from the first request to the last token, the questions' prefill included. *Decoding* counts
from when all sessions have their first token to when the first one ends: the limits and the goals are about that.
Limits are what a step must at least read and multiply: *private* where each session reads all its keys and values for
itself, *shared* where the system prompt's are read once.

*GPU ms* and *idle* are from one more run, with an event before and after each replayed graph; *wall/GPU* is the step
of the other runs over that. Numbers are medians of RUNS runs (--runs) after one that warms up.
"""

import argparse
import contextlib
import gc
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, logging

from benchmarks import random_model
from benchmarks.ceilings import Ceilings
from benchmarks.random_model import SHAPES, Limits
from benchmarks.report import ROOT, Table, header, show_header
from chatpage import tutor
from chatpage.engine import Engine
from chatpage.model.load import choose_device, choose_dtype
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Prompt, Request
from chatpage.settings import Settings
from chatpage.text.template import ChatTemplate

RUNS = 5
BLOCK = 16  # as many steps fill a block: what is held is averaged over them, since all sessions begin together

Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked.

    Attributes:
        shared: tokens of the system prompt.
        question, new: tokens of a question and of its answer.
        crowd: sessions where one number must do.
        hello: tokens of the question whose first token is timed.
        stranger: tokens of a newcomer's prompt that nobody has seen.
        peers: tokens that all prompts begin with, and of each one's own, where the peers answer too.
    """

    sessions: tuple[int, ...] = (1, 16, 64, 256)
    shared: int = 2048
    question: int = 128
    new: int = 128
    crowd: int = 64
    hello: int = 64
    stranger: int = 1024
    peers: tuple[int, int] = (1024, 64)
    kv_blocks: int = 16_384


WORKLOAD = Workload()
TINY = Workload((1, 4, 8), 128, 16, 16, 4, 16, 64, (64, 16), 4096)

# performance.md: floor and aim of output tokens a second; how many times faster with sharing.
SPEEDS = {
    ("8b", 1): (200, 225),
    ("8b", 64): (9_500, 11_000),
    ("8b", 256): (22_000, 27_000),
    ("0.6b", 1): (600, 1_000),
    ("0.6b", 64): (30_000, 45_000),
    ("0.6b", 256): (60_000, 85_000),
}
SHARING = {"8b": 1.4, "0.6b": 2.5}
LESS_MEMORY = 10
WALL_OVER_GPU = 1.10
WASTE = 0.04
GAP = 4
FIRST = 10
HTTP = 0.85


# -- asking ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Turn:
    """One request: when it was made, when each of its tokens came, and its last delta."""

    begun: float
    came: list[float] = field(default_factory=list)
    last: Delta | None = None

    @property
    def first(self) -> float:
        return self.came[0]


class Crowd:
    """Requests made at once. Times are taken where the engine hands the tokens out.

    Args:
        look: is called on the engine's thread in BLOCK steps in the middle of the first one's answer.
    """

    def __init__(self, engine: Engine, prompts: list[Prompt], new: int, look: Callable[[], None] | None = None) -> None:
        self.new = new
        self._ended = threading.Semaphore(0)
        self._look = look
        params = SamplingParams(temperature=0, max_tokens=new)
        self.turns: list[Turn] = []
        for prompt in prompts:
            turn = Turn(time.perf_counter())
            self.turns.append(turn)
            engine.stream(Request(prompt, params), self._listener(turn))

    def _listener(self, turn: Turn) -> Callable[[Delta], None]:
        look = self._look if len(self.turns) == 1 else None
        begin, now, came = self.new // 2 - BLOCK // 2, time.perf_counter, turn.came
        middle = range(begin, begin + BLOCK)

        def hear(delta: Delta) -> None:
            for _ in delta.tokens:
                came.append(now())
            if look is not None and len(came) in middle:
                look()
            if delta.state == "done":
                turn.last = delta
                self._ended.release()

        return hear

    def wait(self) -> "Crowd":
        for _ in self.turns:
            self._ended.acquire()
        for turn in self.turns:
            if len(turn.came) != self.new:
                raise RuntimeError(f"An answer has {len(turn.came)} tokens instead of {self.new}: {turn.last}")
        return self

    def wait_for(self, tokens: int) -> None:
        """Until each has so many."""
        while any(len(turn.came) < tokens for turn in self.turns):
            if any(turn.last for turn in self.turns):
                raise RuntimeError("Some ended before others began.")
            time.sleep(0.002)

    # -- what came of it ----------------------------------------------------------------------------------------------

    @property
    def speed(self) -> float:
        """Tokens a second, from the first request to the last token."""
        seconds = max(turn.came[-1] for turn in self.turns) - self.turns[0].begun
        return len(self.turns) * self.new / seconds

    @property
    def window(self) -> tuple[float, float]:
        """While all of them decode."""
        return max(turn.first for turn in self.turns), min(turn.came[-1] for turn in self.turns)

    def indices(self) -> list[int]:
        """Of the tokens that came in the window, how many of the answer each was."""
        begun, ended = self.window
        return [i for turn in self.turns for i, came in enumerate(turn.came) if begun < came <= ended]

    @property
    def step(self) -> float:
        """Seconds of a decode step in the window, in which each gets a token."""
        begun, ended = self.window
        tokens = len(self.indices())
        return (ended - begun) * len(self.turns) / tokens if tokens else float("nan")


class Prompts:
    """Random questions that nobody has asked before, behind the system prompt or alone."""

    _random = random.Random(1)  # one for all: an engine remembers what others have asked it

    def __init__(self, engine: Engine) -> None:
        self._system = engine.systems[0].tokens
        self._system_tokens = len(self._system) if engine.sharing != "off" else 0

    @property
    def shared(self) -> int:
        return len(self._system)

    def fresh(self, length: int) -> Tokens:
        return self._random.choices(range(5, 2000), k=length)

    def behind(self, length: int) -> Prompt:
        return Prompt((*self._system, *self.fresh(length)), self._system_tokens)

    def alone(self, length: int) -> Prompt:
        return Prompt(tuple(self.fresh(length)))


# -- what the GPU does -------------------------------------------------------------------------------------------------


class Replays:
    """The time between the beginning and the end of each graph that is replayed meanwhile, on the GPU's own clock."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, Any, Any]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        replay = torch.cuda.CUDAGraph.replay

        def timed(graph: torch.cuda.CUDAGraph) -> None:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._seen.append((time.perf_counter(), begun, ended))
            begun.record()
            replay(graph)
            ended.record()

        with patch.object(torch.cuda.CUDAGraph, "replay", timed):
            yield

    def within(self, begun: float, ended: float) -> tuple[float, float] | None:
        """Seconds of all replays that were launched between these times, and from the first to the end of the last."""
        torch.cuda.synchronize()
        seen = [(a, b) for at, a, b in self._seen if begun <= at < ended]
        if not seen:
            return None
        busy = sum(a.elapsed_time(b) for a, b in seen) / 1000
        return busy, seen[0][0].elapsed_time(seen[-1][1]) / 1000


# -- the engine --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """What is measured, with what, and where it is told."""

    shape: str
    workload: Workload
    limits: Limits
    device: torch.device
    dtype: torch.dtype
    runs: int
    as_json: bool
    tables: dict[str, Table]
    shared_chat: tuple[float, float] | None = None  # tokens a second and blocks of the crowd, with sharing

    @property
    def config(self) -> PreTrainedConfig:
        return SHAPES[self.shape]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def add(self, title: str, row: dict[str, Any]) -> None:
        table = self.tables.setdefault(title, Table(title, as_json=self.as_json))
        table.add({"shape": self.shape, **row})

    @contextlib.contextmanager
    def engine(self, *, shared: int | None = None, sharing: str = "all") -> Iterator[Engine]:
        _free()  # what the engine before has left
        with self.settings(shared=shared, sharing=sharing) as settings:
            engine = Engine(settings)
            begun = time.perf_counter()
            engine.start()
            try:
                engine.wait_ready()
                self.say_start(engine, time.perf_counter() - begun)
                yield engine
            finally:
                engine.stop(timeout=30)
                del engine
                _free()

    @contextlib.contextmanager
    def settings(self, *, shared: int | None = None, sharing: str = "all") -> Iterator[Settings]:
        """For an engine that is started inside of this."""
        text = _system_prompt(self.workload.shared if shared is None else shared)
        with tempfile.TemporaryDirectory() as folder, random_model.serving(self.config, Path(folder)) as model:
            yield Settings(
                model=model,
                system_prompt=text,
                sharing=sharing,
                device="auto",
                kv_blocks=self.workload.kv_blocks,
                # Where each computes the system prompt, steps are larger: all decode before the first is half-way.
                max_step_tokens=8192 if sharing == "off" else 2048,
            )

    def say_start(self, engine: Engine, seconds: float) -> None:
        self.add(
            "Start",
            {
                "sharing": engine.sharing,
                "ready after s": seconds,
                "weights GB": self.limits.weights * self.limits.size / 1e9,
                "system prompt": len(engine.systems[0].tokens),
                "blocks": engine.num_blocks,
                "pool GiB": engine.num_blocks * engine.core.runner.pool.bytes_per_block / 2**30,
                "longest context": engine.max_model_len,
                "notes": " ".join(engine.notes),
            },
        )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _system_prompt(tokens: int) -> str:
    """A text of so many tokens, as the bundled tokenizer counts, with what the template puts around it."""
    from transformers import AutoTokenizer

    template = ChatTemplate(AutoTokenizer.from_pretrained(tutor.path()))

    def missing(text: str) -> int:
        return tokens - len(template.system_prefix(text))

    words = tutor.system_prompt().split()
    many = list(itertools.islice(itertools.cycle(words), tokens))
    low, high = 1, len(many)
    while high - low > 1:
        middle = (low + high) // 2
        if missing(" ".join(many[:middle])) >= 0:
            low = middle
        else:
            high = middle
    text = " ".join(many[:low])
    text += missing(text) * " a"
    if missing(text):
        raise ValueError(f"No system prompt of {tokens} tokens was found.")
    return text


# -- questions ---------------------------------------------------------------------------------------------------------


def speed(bench: Bench, engine: Engine) -> None:
    """Tokens a second, a step and what it could be, and the memory, for some numbers of sessions."""
    chats = [Chat(bench, engine, sessions) for sessions in bench.workload.sessions]
    for chat in chats:
        chat.run()
        row = _speed_row(bench, chat)
        if bench.on_gpu:
            row |= _gpu_share(chat, row["ms a step"])
        bench.add("Speed", row)
        if chat.sessions == bench.workload.crowd:
            bench.shared_chat = chat.decoding, chat.blocks
    for chat in chats:
        _tell_memory(bench, engine, chat)


class Chat:
    """So many sessions that ask one question each, behind the system prompt; again and again."""

    def __init__(self, bench: "Bench", engine: Engine, sessions: int) -> None:
        self.sessions = sessions
        self.prompts = Prompts(engine)
        self.crowds: list[Crowd] = []
        self.held: list[tuple[int, int]] = []  # blocks, and their slots that hold something
        self._bench, self._engine = bench, engine

    def run(self) -> None:
        """Once to warm up and to look at the blocks, and then as often as wanted."""
        self.once(lambda: self.held.append(_held(self._engine)))
        self.crowds = [self.once() for _ in range(self._bench.runs)]

    def once(self, look: Callable[[], None] | None = None) -> Crowd:
        work = self._bench.workload
        questions = [self.prompts.behind(work.question) for _ in range(self.sessions)]
        return Crowd(self._engine, questions, work.new, look).wait()

    @property
    def blocks(self) -> float:
        return statistics.mean(blocks for blocks, _ in self.held)

    @property
    def waste(self) -> float:
        """The share of the held slots that hold nothing."""
        slots = sum(blocks for blocks, _ in self.held) * self._engine.block_size
        return 1 - sum(filled for _, filled in self.held) / slots

    @property
    def step(self) -> float:
        return statistics.median(crowd.step for crowd in self.crowds)

    @property
    def decoding(self) -> float:
        """Tokens a second while all decode."""
        return self.sessions / self.step


def _held(engine: Engine) -> tuple[int, int]:
    """Blocks that tables hold, and their slots that hold something."""
    pool = engine.core.pool
    held = [fill for ref, fill in zip(pool.ref[1:], pool.fill[1:], strict=True) if ref]
    return len(held), sum(held)


def _speed_row(bench: Bench, chat: Chat) -> dict[str, Any]:
    sessions, shared = chat.sessions, chat.prompts.shared
    indices = [index for crowd in chat.crowds for index in crowd.indices()]
    own = bench.workload.question + statistics.mean(indices or [0])
    whole = statistics.median(crowd.speed for crowd in chat.crowds)
    private = sessions / bench.limits.private_read(sessions, shared, own)
    best = sessions / bench.limits.shared_read(sessions, shared, own)
    goal = SPEEDS.get((bench.shape, sessions))
    return {
        "sessions": sessions,
        "own": own,
        "tokens/s": whole,
        "decoding": chat.decoding,
        "spread": _spread([sessions / crowd.step for crowd in chat.crowds]),
        "ms a step": 1000 * chat.step,
        "private limit": private,
        "shared limit": best,
        "of it": chat.decoding / best,
        "floor · aim": f"{goal[0]:,} · {goal[1]:,}" if goal else "",
        "decoding meets": _meets(chat.decoding, goal),
        "whole meets": _meets(whole, goal),
    }


def _meets(found: float, goal: tuple[float, float] | None) -> str:
    if goal is None:
        return ""
    return "aim" if found >= goal[1] else "floor" if found >= goal[0] else "no"


def _gpu_share(chat: Chat, step: float) -> dict[str, Any]:
    """The GPU's part of a step that takes so many ms."""
    replays = Replays()
    with replays.watching():
        seen = chat.once()
    goal = f"≤ {WALL_OVER_GPU}"
    found = replays.within(*seen.window)
    if found is None:
        return {"GPU ms": "no graph", "wall/GPU": None, goal: "", "idle": None}
    busy, span = found
    begun, ended = seen.window
    gpu = 1000 * busy * seen.step / (ended - begun)
    return {"GPU ms": gpu, "wall/GPU": step / gpu, goal: _yes(step / gpu <= WALL_OVER_GPU), "idle": 1 - busy / span}


def _tell_memory(bench: Bench, engine: Engine, chat: Chat) -> None:
    sessions, work = chat.sessions, bench.workload
    size, slots = bench.limits.kv_bytes, chat.blocks * engine.block_size
    held = sessions * (chat.prompts.shared + work.question + work.new // 2)
    reserved = sessions * engine.max_model_len
    bench.add(
        "Memory of keys and values in the middle of the answers",
        {
            "sessions": sessions,
            "blocks held": chat.blocks,
            "MiB": slots * size / 2**20,
            "waste": chat.waste,
            "goal": f"< {WASTE}",
            "met": _yes(chat.waste < WASTE),
            "as if not shared, MiB": held * size / 2**20,
            "times less": held / slots,
            f"one reservation of {engine.max_model_len:,} each, MiB": reserved * size / 2**20,
            "its waste": 1 - held / reserved,
        },
    )


def crowd_with_sharing(bench: Bench, engine: Engine) -> None:
    """What `sharing` compares with, where `speed` has not found it out."""
    if bench.shared_chat is None:
        chat = Chat(bench, engine, bench.workload.crowd)
        chat.run()
        bench.shared_chat = chat.decoding, chat.blocks


def sharing(bench: Bench) -> None:
    """The chat in an engine without sharing, beside the same with it."""
    assert bench.shared_chat is not None, "the engine with sharing was not measured"
    with_it, on = bench.shared_chat
    sessions = bench.workload.crowd
    with bench.engine(sharing="off") as engine:
        chat = Chat(bench, engine, sessions)
        chat.run()
    ratio, memory, goal = with_it / chat.decoding, chat.blocks / on, SHARING.get(bench.shape, 1.0)
    own = bench.workload.question + bench.workload.new / 2
    bench.add(
        f"Sharing, {sessions} sessions",
        {
            "decoding, on": with_it,
            "off": chat.decoding,
            "limit of off": sessions / bench.limits.private_read(sessions, chat.prompts.shared, own),
            "ratio": ratio,
            "goal": f"≥ {goal}",
            "met": _yes(ratio >= goal),
            "blocks, on": on,
            "blocks, off": chat.blocks,
            "times less": memory,
            "memory goal": f"≥ {LESS_MEMORY}",
            "memory met": _yes(memory >= LESS_MEMORY),
        },
    )


def gaps(bench: Bench, engine: Engine) -> None:
    """The gaps between a session's tokens while others come, one after the other."""
    work, prompts = bench.workload, Prompts(engine)
    newcomers = {
        f"a question of {work.question} behind the system prompt": lambda: prompts.behind(work.question),
        f"{work.stranger:,} tokens that nobody has seen": lambda: prompts.alone(work.stranger),
    }
    for name, newcomer in newcomers.items():
        _gaps(bench, engine, prompts, name, newcomer)  # warms up
        _gaps(bench, engine, prompts, name, newcomer, told=True)


def _gaps(
    bench: Bench, engine: Engine, prompts: Prompts, name: str, newcomer: Callable[[], Prompt], *, told: bool = False
) -> None:
    work = bench.workload
    crowd = Crowd(engine, [prompts.behind(work.question) for _ in range(work.crowd)], 4 * work.new)
    crowd.wait_for(1)
    quiet_begun = time.perf_counter()
    crowd.wait_for(work.new)
    begun = time.perf_counter()
    quiet = statistics.median(_gaps_between(crowd, quiet_begun, begun))
    came = []
    while not any(turn.last for turn in crowd.turns):
        came.append(Crowd(engine, [newcomer()], 4))
        time.sleep(10 * quiet)
    crowd.wait()
    firsts = [other.wait().turns[0].first - other.turns[0].begun for other in came]
    found = _gaps_between(crowd, begun, crowd.window[1])
    middle, late = statistics.median(found), _percentile(found, 99)
    if told:
        bench.add(
            f"Gaps between tokens of {work.crowd} sessions, ms, one newcomer every ten steps",
            {
                "newcomer": name.ljust(44),
                "newcomers": len(came),
                "p50 before": 1000 * quiet,
                "p50": 1000 * middle,
                "p99": 1000 * late,
                "longest": 1000 * max(found),
                "p99 / p50": late / middle,
                "goal": f"≤ {GAP}",
                "met": _yes(late / middle <= GAP),
                "p99 / p50 before": late / quiet,
                "newcomers' first token, p50": 1000 * statistics.median(firsts),
            },
        )


def _gaps_between(crowd: Crowd, begun: float, ended: float) -> list[float]:
    """Of pairs of tokens whose later one came in between."""
    pairs = (pair for turn in crowd.turns for pair in itertools.pairwise(turn.came[:]))
    return [late - early for early, late in pairs if begun < late <= ended]


def first(bench: Bench, engine: Engine) -> None:
    """The first token of a session that is alone, behind the system prompt, and behind one that nobody has seen."""
    prompts, hello = Prompts(engine), bench.workload.hello
    kinds = {"warm": lambda: prompts.behind(hello), "cold": lambda: prompts.alone(prompts.shared + hello)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    computed: dict[str, int] = {}
    for run in range(2 * bench.runs + 1):
        for name, prompt in kinds.items():
            [turn] = Crowd(engine, [prompt()], 1).wait().turns
            assert turn.last is not None
            computed[name] = turn.last.prompt_tokens - turn.last.cached_tokens
            if run:
                seconds[name].append(turn.first - turn.begun)
    warm, cold = (1000 * statistics.median(seconds[name]) for name in ("warm", "cold"))
    bench.add(
        "First token, ms",
        {
            "prompt": f"{prompts.shared:,} + {hello}",
            "warm": warm,
            "spread": _spread(seconds["warm"]),
            "cold": cold,
            "cold / warm": cold / warm,
            "goal": f"≥ {FIRST}",
            "met": _yes(cold / warm >= FIRST),
            "computed, warm": computed["warm"],
            "computed, cold": computed["cold"],
            "limit, warm": 1000 * bench.limits.first_token(prompts.shared, hello),
            "limit, cold": 1000 * bench.limits.first_token(0, prompts.shared + hello),
        },
    )


def profile(bench: Bench, engine: Engine) -> None:
    """The kernels of a decode step, the longest first."""
    if not bench.on_gpu:
        return
    work, prompts = bench.workload, Prompts(engine)
    for sessions in work.sessions:
        crowd = Crowd(engine, [prompts.behind(work.question) for _ in range(sessions)], 4 * work.new)
        crowd.wait_for(work.new)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            before = len(crowd.turns[0].came)
            crowd.wait_for(before + work.new // 2)
            steps = len(crowd.turns[0].came) - before
        crowd.wait()
        kernels = sorted(seen.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
        for kernel in kernels[:16]:
            bench.add(
                "Where the GPU's time goes (profiled, which costs some), µs a step",
                {
                    "sessions": sessions,
                    "µs": f"{kernel.self_device_time_total / steps:8,.1f}",
                    "calls": f"{kernel.count / steps:6.1f}",
                    "kernel": kernel.key[:100],
                },
            )
        total = sum(kernel.self_device_time_total for kernel in kernels) / steps
        bench.add("Kernels in all, µs a step", {"sessions": sessions, "µs": total, "kinds": len(kernels)})


# -- over HTTP ---------------------------------------------------------------------------------------------------------

CLIENTS = 8  # processes


def http(bench: Bench) -> None:
    """Streams over HTTP, and the same from the engine itself; both in one process, the clients in others."""
    sessions, new = bench.workload.sessions[-1], bench.workload.new
    begun = time.perf_counter()
    with bench.settings() as settings, _server(settings) as (engine, url):
        bench.say_start(engine, time.perf_counter() - begun)
        questions = _Questions(engine, bench.workload.question)
        runs = min(3, bench.runs)

        def without() -> Crowd:
            return Crowd(engine, [_prompt(engine, text) for text in questions.fresh(sessions)], new).wait()

        def rendering() -> tuple[float, float]:
            """Tokens a second, with the time in which messages become tokens."""
            begun = time.perf_counter()
            crowd = without()
            return sessions * new / (max(turn.came[-1] for turn in crowd.turns) - begun), crowd.speed

        rendering()
        speeds = [rendering() for _ in range(runs)]
        with_rendering, alone = (statistics.median(column) for column in zip(*speeds, strict=True))
        with _clients(min(CLIENTS, sessions), url) as ask:
            ask(questions.fresh(sessions), new)
            for _ in range(runs):
                answers = ask(questions.fresh(sessions), new)
                _tell_http(bench, answers, alone, with_rendering)


def _tell_http(bench: Bench, answers: list[dict[str, Any]], alone: float, with_rendering: float) -> None:
    errors = [answer["error"] for answer in answers if answer["error"]]
    for error in list(dict.fromkeys(errors))[:3]:
        print(f"error: {error}", file=sys.stderr, flush=True)
    well = [answer for answer in answers if not answer["error"]]
    if not well:
        raise RuntimeError(f"No answer came: {errors[0]}")
    seconds = max(answer["ended"] for answer in well) - min(answer["begun"] for answer in answers)
    found = sum(answer["tokens"] for answer in well) / seconds
    # The first piece is the role; the last one has the end of the text, and says why it ended.
    between = [b - a for answer in well for a, b in itertools.pairwise(answer["came"][1:])] or [float("nan")]
    ratio = found / alone
    bench.add(
        f"{len(answers)} streams over HTTP, {CLIENTS} processes of clients",
        {
            "errors": len(errors),
            "tokens/s": found,
            "engine alone": alone,
            "ratio": ratio,
            "goal": f"≥ {HTTP}",
            "met": _yes(ratio >= HTTP and not errors),
            "engine with rendering": with_rendering,
            "ratio to that": found / with_rendering,
            "gap p50 ms": 1000 * statistics.median(between),
            "gap p99 ms": 1000 * _percentile(between, 99),
            "first text p50 ms": 1000
            * statistics.median(a["came"][min(1, len(a["came"]) - 1)] - a["begun"] for a in well),
        },
    )


def _prompt(engine: Engine, text: str) -> Prompt:
    return engine.prompt([{"role": "user", "content": text}])


class _Questions:
    """Texts of random words, about so many tokens each."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self._random = random.Random(2)
        self._words = sorted({*tutor.system_prompt().split()})
        self._count = 1
        [short] = self.fresh(1)
        self._count = 201
        [long] = self.fresh(1)
        per_word = (len(_prompt(engine, long).tokens) - len(_prompt(engine, short).tokens)) / 200
        self._count = max(1, round(tokens / per_word))

    def fresh(self, count: int) -> list[str]:
        return [" ".join(self._random.choices(self._words, k=self._count)) for _ in range(count)]


@contextlib.contextmanager
def _server(settings: Settings) -> Iterator[tuple[Engine, str]]:
    """An engine behind uvicorn, in a thread of this process."""
    import asyncio

    import uvicorn

    from chatpage.launch import bind, url_of
    from chatpage.web.app import create_app

    listener = bind("127.0.0.1", 0)
    engine = Engine(settings)
    app = create_app(engine, settings, page=False)
    config = uvicorn.Config(app, lifespan="on", log_level="error", access_log=False, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        engine.wait_ready()
        yield engine, url_of("127.0.0.1", listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        del engine, app
        _free()


@contextlib.contextmanager
def _clients(count: int, url: str) -> Iterator[Callable[[list[str], int], list[dict[str, Any]]]]:
    """Ask questions from so many processes at once; what came of each question."""

    def ask(questions: list[str], new: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "benchmarks.clients", url]
        shares = [questions[i::count] for i in range(count)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        clients = [subprocess.Popen(command, **pipes) for _ in shares]
        running.extend(clients)
        for client, share in zip(clients, shares, strict=True):
            print(json.dumps({"questions": share, "new": new}), file=client.stdin, flush=True)
        for client in clients:
            client.stdout.readline()
        for client in clients:
            print(file=client.stdin, flush=True)
        answers = [json.loads(client.stdout.readline()) for client in clients]
        for client in clients:
            client.wait()
        return list(itertools.chain(*answers))

    running: list[subprocess.Popen] = []
    try:
        yield ask
    finally:
        for client in running:
            client.kill()


# -- peers -------------------------------------------------------------------------------------------------------------


def peers(bench: Bench) -> None:
    """Ours and transformers' own, with the same prompts, taking the time from the first request to the last token."""
    sessions = bench.workload.sessions
    with bench.engine(shared=16) as engine:
        for count in sessions:
            _tell_peer(bench, "ours", count, partial(_ours, bench, engine, count))
        del engine
    module = random_model.make(bench.config, bench.device, bench.dtype, "sdpa")
    for count in sessions[:-1]:
        _tell_peer(bench, "generate", count, partial(_generate, bench, module, count))
    for name, graphs in {"generate_batch": None, "generate_batch, CUDA graphs": True}.items():
        if graphs is None or bench.on_gpu:
            for count in sessions:
                _tell_peer(bench, name, count, partial(_generate_batch, bench, module, count, graphs))


def _tell_peer(bench: Bench, name: str, sessions: int, seconds: Callable[[], list[float]]) -> None:
    shared, own = bench.workload.peers
    row: dict[str, Any] = {"who": name.ljust(27), "sessions": sessions}
    try:
        took = seconds()
        speeds = [sessions * bench.workload.new / second for second in took]
        row |= {"tokens/s": statistics.median(speeds), "runs": len(took), "spread": _spread(speeds)}
    except Exception as error:
        traceback.print_exc()
        row |= {"tokens/s": f"did not run: {str(error).strip()[:100]}", "runs": 0, "spread": ""}
    _free()
    bench.add(f"Peers: {shared:,} + {own} tokens of prompt, {bench.workload.new} of answer, wall time", row)


def _peer_prompts(bench: Bench, sessions: int, seed: int) -> list[Tokens]:
    shared, own = bench.workload.peers
    draw = random.Random(f"{sessions} {seed}")  # an engine remembers what fewer sessions have asked it
    common = draw.choices(range(5, 2000), k=shared)
    return [common + draw.choices(range(5, 2000), k=own) for _ in range(sessions)]


def _ours(bench: Bench, engine: Engine, sessions: int) -> list[float]:
    """The common tokens are new in each run, and computed once in it."""
    crowds = []
    for run in range(bench.runs + 1):
        prompts = [Prompt(tuple(prompt)) for prompt in _peer_prompts(bench, sessions, run)]
        crowds.append(Crowd(engine, prompts, bench.workload.new).wait())
    return [sessions * bench.workload.new / crowd.speed for crowd in crowds[1:]]


def _generate(bench: Bench, module: PreTrainedModel, sessions: int) -> list[float]:
    """One run after a short one that warms up: a second takes long."""

    def answer(new: int) -> float:
        ids = torch.tensor(_peer_prompts(bench, sessions, new), device=bench.device)
        begun = time.perf_counter()
        out = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        out.cpu()
        assert out.shape[1] == ids.shape[1] + new
        return time.perf_counter() - begun

    answer(4)
    return [answer(bench.workload.new)]


def _generate_batch(bench: Bench, module: PreTrainedModel, sessions: int, graphs: bool | None) -> list[float]:
    """Two runs after one that warms up, with the same manager."""
    new = bench.workload.new
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=0)
    size = {"max_memory_percent": 0.6} if bench.on_gpu else {"num_blocks": 64, "max_batch_tokens": 1024}
    batching = ContinuousBatchingConfig(use_cuda_graph=graphs, **size)
    took = []
    try:
        for run in range(3):
            prompts = _peer_prompts(bench, sessions, run)
            begun = time.perf_counter()
            out = module.generate_batch(
                prompts, generation_config=config, continuous_batching_config=batching, persistent_manager=True
            )
            took.append(time.perf_counter() - begun)
            lengths = [len(answer.generated_tokens) for answer in out.values()]
            if lengths != [new] * sessions:
                raise RuntimeError(f"{sum(lengths)} tokens came instead of {new * sessions}")
    finally:
        module.destroy_cached_continuous_batching_manager()
    return took[1:]


# -- the program -------------------------------------------------------------------------------------------------------


def _percentile(numbers: list[float], percent: int) -> float:
    return sorted(numbers)[min(len(numbers) - 1, len(numbers) * percent // 100)]


def _spread(numbers: list[float]) -> str:
    """The least and the most, over the median."""
    middle = statistics.median(numbers)
    return f"{min(numbers) / middle:.2f}–{max(numbers) / middle:.2f}"


def _yes(met: bool) -> str:
    return "yes" if met else "no"


# One engine answers these; each of the others starts its own.
TOGETHER = {"speed": speed, "gaps": gaps, "first": first, "profile": profile, "sharing": crowd_with_sharing}
ALONE = {"sharing": sharing, "http": http, "peers": peers}
USUAL = ["speed", "gaps", "first", "sharing", "http"]


def measure(bench: Bench, only: list[str]) -> bool:
    """Ask all questions about a shape. False where one of them could not be answered."""
    well = True

    def ask(name: str, question: Callable[..., None], *engine: Engine) -> None:
        nonlocal well
        try:
            question(bench, *engine)
        except Exception:
            traceback.print_exc()
            print(f"{bench.shape}: {name} could not be measured", file=sys.stderr, flush=True)
            well = False

    def ask_together() -> None:
        with bench.engine() as engine:
            for name in together:
                ask(name, TOGETHER[name], engine)
            del engine

    together = [name for name in TOGETHER if name in only]
    if together:
        ask("the start", lambda _bench: ask_together())
    for name in [name for name in ALONE if name in only]:
        ask(name, ALONE[name])
    return well


def main() -> None:
    names = list(TOGETHER | ALONE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["0.6b", "8b"])
    parser.add_argument("--only", nargs="+", choices=names, default=USUAL, help=f"left out: {' '.join(USUAL)}")
    parser.add_argument("--peers", action="store_true", help="transformers too, which is slow")
    parser.add_argument("--sessions", nargs="+", type=int, help="numbers of sessions, instead of the usual ones")
    parser.add_argument("--runs", type=int, default=RUNS)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    getLogger("ContinuousBatchingLogger").setLevel("ERROR")
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    if device.type == "cpu" and chosen.shape != ["tiny"]:
        sys.exit("benchmarks.engine needs a CUDA GPU; --shape tiny tries it on a CPU.")
    ceilings = Ceilings.measure(device, dtype)
    about = header(**ceilings.about(), dtype=str(dtype), weights="random", runs=chosen.runs)
    show_header(about, as_json=chosen.json)
    tables: dict[str, Table] = {}
    well = True
    for shape in chosen.shape:
        workload = TINY if shape == "tiny" else WORKLOAD
        if chosen.sessions:
            workload = replace(workload, sessions=tuple(chosen.sessions))
        limits = Limits.of(SHAPES[shape], ceilings, dtype)
        bench = Bench(shape, workload, limits, device, dtype, chosen.runs, chosen.json, tables)
        well &= measure(bench, [*chosen.only, *(["peers"] if chosen.peers else [])])
    if not well:
        sys.exit(1)


if __name__ == "__main__":
    main()
