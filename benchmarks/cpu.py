"""The engine on a CPU beside transformers' `generate` and `generate_batch`, in one run.

    python -m benchmarks.cpu            a table
    python -m benchmarks.cpu --json     one line a row

A Llama of 14 million parameters with random weights in fp32, greedy. Times are whole: from the first request to the
last token, through the engine's thread and its streams. Each number is the median of RUNS runs after one that warms up.
Ours and `generate` take turns, so that what else the machine does hits both alike; `generate_batch` comes after them,
because its thread is never idle while it lives.

Each has a process of its own. OpenMP keeps threads for every thread that computes; where these are more than the cores,
they no longer wait for each other busily but sleep, and whoever computes then takes two to three times as long.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, logging

from benchmarks.report import header, show
from benchmarks.shape import LLAMA_14M, save
from chatpage.engine import Engine
from chatpage.model.batch import Drawn, Row
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Prompt, Request
from chatpage.settings import Settings

RUNS = 5
NEW = 96  # tokens of an answer
SHARED, OWN = 512, 32
MAX_MODEL_LEN = 1024
SESSIONS = (1, 8, 32, 64)

Tokens = list[int]
Serve = Callable[[list[Tokens], int], None]  # prompts, and how many tokens each is answered with


class Prompts:
    """Random prompts, none of which was seen before."""

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(1)

    def fresh(self, count: int, length: int) -> list[Tokens]:
        return torch.randint(5, 2000, (count, length), generator=self._random).tolist()

    def behind(self, shared: Tokens, count: int) -> list[Tokens]:
        return [shared + own for own in self.fresh(count, OWN)]


# -- who serves --------------------------------------------------------------------------------------------------------


def start(folder: Path, **settings: Any) -> Engine:
    wanted = {"kv_blocks": 4096, "max_model_len": MAX_MODEL_LEN, "sharing": "all", "max_step_tokens": 1024}
    engine = Engine(Settings(model=str(folder), device="cpu", dtype="float32", **(wanted | settings)))
    engine.start()
    engine.wait_ready()
    return engine


def serve(engine: Engine, prompts: list[Tokens], new: int) -> None:
    """Answers are taken when they are whole, as the peers give them: reading along would take time from the step."""
    params = SamplingParams(temperature=0, max_tokens=new)
    ended = threading.Semaphore(0)

    def hear(delta: Delta) -> None:
        if delta.state == "done":
            ended.release()

    streams = [engine.stream(Request(Prompt(tuple(prompt)), params), hear) for prompt in prompts]
    for _ in streams:
        ended.acquire()
    for stream in streams:
        *_, last = stream
        assert last.completion_tokens == new, last


def generate(model: PreTrainedModel, prompts: list[Tokens], new: int) -> None:
    ids = torch.tensor(prompts)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    assert out.shape[1] == ids.shape[1] + new


def generate_batch(model: PreTrainedModel, prompts: list[Tokens], new: int) -> None:
    """Its manager stays between calls, as ours does, and its pool is of our size: else it takes all memory."""
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=1024)  # blocks of 256
    out = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching, warmup=False, persistent_manager=True
    )
    assert [len(answer.generated_tokens) for answer in out.values()] == [new] * len(prompts)


def ours(folder: Path) -> Serve:
    return partial(serve, start(folder))


def plain(folder: Path) -> Serve:
    return partial(generate, _loaded(folder))


def batched(folder: Path) -> Serve:
    return partial(generate_batch, _loaded(folder))


def _loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Apart:
    """One who answers, in another process."""

    _serve: Serve  # there

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    @classmethod
    @contextmanager
    def running(cls, who: Callable[[Path], Serve], folder: Path) -> Iterator["Apart"]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=cls._begin, initargs=(who, folder)) as pool:
            yield cls(pool)

    def seconds(self, prompts: list[Tokens], new: int = NEW) -> float:
        """That the answers take."""
        return self._pool.submit(self._timed, prompts, new).result()

    @classmethod
    def _begin(cls, who: Callable[[Path], Serve], folder: Path) -> None:
        _be_quiet()
        cls._serve = staticmethod(who(folder))

    @classmethod
    def _timed(cls, prompts: list[Tokens], new: int) -> float:
        begun = time.perf_counter()
        cls._serve(prompts, new)
        return time.perf_counter() - begun


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("ContinuousBatchingLogger").setLevel("ERROR")


# -- questions ---------------------------------------------------------------------------------------------------------


def throughput(who: dict[str, Apart], ask: Callable[[], list[Tokens]]) -> dict[str, Any]:
    """Output tokens per second of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in who}
    for run in range(RUNS + 1):
        for name, one in who.items():
            took = one.seconds(ask())
            if run:
                seconds[name].append(took)
    count = len(ask()) * NEW
    speeds = {name: count / statistics.median(took) for name, took in seconds.items()}
    spread = {"spread": _spread(seconds["ours"])} if "ours" in who else {}
    return {**speeds, **spread}


def first_token(engine: Apart, prompts: Prompts) -> list[dict[str, Any]]:
    """Seconds to the first token behind a shared prompt that is in the cache, and behind one that is not."""
    shared = prompts.fresh(1, SHARED)[0]
    engine.seconds(prompts.behind(shared, 1), new=1)
    warm, cold = [], []
    for _ in range(2 * RUNS):
        warm.append(engine.seconds(prompts.behind(shared, 1), new=1))
        cold.append(engine.seconds(prompts.fresh(1, SHARED + OWN), new=1))
    rows = {"behind 512 cached tokens": warm, "behind 512 uncached tokens": cold}
    return [
        {"what": f"first token {name}", "unit": "ms", "ours": 1000 * statistics.median(took), "spread": _spread(took)}
        for name, took in rows.items()
    ]


def bookkeeping(folder: Path, prompts: Prompts, sessions: int = 64) -> list[dict[str, Any]]:
    """What a decode step costs besides the model: schedule, tables and events; and text and streams with them."""
    engine = start(folder)
    core, pieces = engine.core, Stopwatch()
    whole: list[float] = []
    parts: list[float] = []
    left = [0.0]

    def pretend(rows: list[Row]) -> Pretended:
        now = time.perf_counter()
        if left[0] and all(len(row.tokens) == 1 for row in rows) and len(rows) == sessions:
            whole.append(now - left[0])
            parts.append(pieces.seconds)
        left[0], pieces.seconds = time.perf_counter(), 0.0
        return Pretended([Drawn(7 if row.sample else None) for row in rows])

    core.runner.launch = pretend
    core.scheduler.schedule = pieces.around(core.scheduler.schedule)
    core.scheduler.finish = pieces.around(core.scheduler.finish)
    core._hand_out_events = pieces.around(core._hand_out_events)
    serve(engine, prompts.fresh(sessions, OWN), new=400)
    engine.stop()
    return [
        {"what": f"{name}, {sessions} sessions", "unit": "ms a step", "ours": 1000 * statistics.median(spent)}
        for name, spent in (("schedule, tables and events", parts), ("all but the model", whole))
    ]


@dataclass
class Pretended:
    """What a model gives that computes nothing."""

    results: list[Drawn]

    def drawn(self) -> list[Drawn]:
        return self.results


class Stopwatch:
    """Adds up the seconds that some functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - begun

        return measured


def memory(folder: Path) -> list[dict[str, Any]]:
    """Peak resident memory while sessions behind a shared prompt are served and then rest, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for sessions in SESSIONS:
        with context.Pool(1) as pool:
            rows.append(pool.apply(_memory, (folder, sessions)))
    return rows


def _memory(folder: Path, sessions: int) -> dict[str, Any]:
    engine = start(folder, sharing="all")
    prompts = Prompts()
    serve(engine, prompts.fresh(1, 8), new=4)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which loading made, is forgotten
    shared = prompts.fresh(1, SHARED)[0]
    keys = [engine.open_session().key for _ in range(sessions)]
    params = SamplingParams(temperature=0, max_tokens=NEW)
    serve(engine, [shared], new=1)
    requests = [
        Request(Prompt(tuple(p)), params, session=k)
        for p, k in zip(prompts.behind(shared, sessions), keys, strict=True)
    ]
    for stream in [engine.stream(request) for request in requests]:
        list(stream)
    used = engine.core.view.counts()["used"]
    size = engine.core.runner.pool.bytes_per_block
    contiguous = sessions * MAX_MODEL_LEN // engine.block_size * size
    peak = _peak()
    engine.stop()
    return {
        "what": f"memory, {sessions} sessions of 512 shared + {OWN + NEW} tokens",
        "unit": "MiB",
        "ours": peak / 2**20,
        "blocks in use": used * size / 2**20,
        "one reservation each": contiguous / 2**20,
    }


def _peak() -> int:
    """Bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _spread(seconds: list[float]) -> str:
    """The fastest and the slowest run, as shares of the median."""
    middle = statistics.median(seconds)
    return f"{min(seconds) / middle:.2f}–{max(seconds) / middle:.2f}"


# -- the table ---------------------------------------------------------------------------------------------------------


def measure(folder: Path) -> list[dict[str, Any]]:
    prompts = Prompts()
    questions: dict[str, Callable[[], list[Tokens]]] = {
        "1 stream": lambda: prompts.fresh(1, OWN),
        "8 streams": lambda: prompts.fresh(8, OWN),
        "8 streams behind 512 shared tokens": lambda: prompts.behind(prompts.fresh(1, SHARED)[0], 8),
    }
    with Apart.running(ours, folder) as engine, Apart.running(plain, folder) as model:
        in_turns = {"ours": engine, "generate": model}
        rows = [{"what": name, "unit": "tokens/s", **throughput(in_turns, ask)} for name, ask in questions.items()]
        later = first_token(engine, prompts)
    later += [*bookkeeping(folder, prompts), *memory(folder)]
    with Apart.running(batched, folder) as model:
        for row, ask in zip(rows, questions.values(), strict=True):
            row |= throughput({"generate_batch": model}, ask)
    return [*rows, *later]


def judge(rows: list[dict[str, Any]]) -> None:
    """Beside each row its ratio to the peer or limit, and the goal."""
    by_name = {row["what"]: row for row in rows}

    def put(name: str, ratio: float, against: str, goal: str, *, met: bool) -> None:
        by_name[name] |= {"ratio": ratio, "against": against, "goal": goal, "met": "yes" if met else "no"}

    one, eight = by_name["1 stream"], by_name["8 streams"]
    shared = by_name["8 streams behind 512 shared tokens"]
    ratio = one["ours"] / one["generate"]
    put("1 stream", ratio, "generate", "≥ 1.5", met=ratio >= 1.5)
    plain, batched = eight["ours"] / eight["generate"], eight["ours"] / eight["generate_batch"]
    put("8 streams", plain, "generate", "≥ 1.4, and ≥ 5 × generate_batch", met=plain >= 1.4 and batched >= 5)
    eight["ratio to generate_batch"] = batched
    ratio = shared["ours"] / shared["generate_batch"]
    put(shared["what"], ratio, "generate_batch", "≥ 8", met=ratio >= 8)
    warm, cold = (by_name[f"first token behind 512 {kind} tokens"] for kind in ("cached", "uncached"))
    ratio = cold["ours"] / warm["ours"]
    put(warm["what"], ratio, "uncached", "≥ 6", met=ratio >= 6)
    step = by_name["schedule, tables and events, 64 sessions"]
    put(step["what"], step["ours"] / 0.5, "0.5 ms", "≤ 1", met=step["ours"] <= 0.5)
    first, *more = [row for row in rows if row["unit"] == "MiB"]
    for row in more:
        ratio = (row["ours"] - first["ours"]) / (row["blocks in use"] - first["blocks in use"])
        put(row["what"], ratio, "what the blocks grew by", "≤ 1.5 (grows with blocks in use)", met=ratio <= 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    as_json = parser.parse_args().json
    _be_quiet()
    about = header(model="Llama shape, 14 M parameters, random weights, fp32", runs=RUNS, new_tokens=NEW)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(save(LLAMA_14M, Path(folder)))
    judge(rows)
    show(about, rows, as_json=as_json)


if __name__ == "__main__":
    main()
