"""The attention kernels on a GPU, beside the limits of memory, the goals, and what PyTorch offers.

    python -m benchmarks.kernels                      all tables
    python -m benchmarks.kernels --only choice --grid the whole grid of that table
    python -m benchmarks.kernels --json               one line a row, as it comes
    TRITON_INTERPRET=1 python -m benchmarks.kernels --sanity    tiny shapes on a CPU: what the kernels say is right

One call is timed inside a CUDA graph of many, which go round over the layers of a pool, and over several sets of
sessions where those are small: together they read several times what the L2 holds, as a model's layers do. Each number
is the median of RUNS replays, and *spread* the fastest and the slowest of them over it. *Error* is how far the answers
of a few sessions are from attention in fp32, as a share of those.

A limit is the time to read what must be read, once, at the copy ceiling: the keys and values of each session for itself
(private), or the shared ones once for all (shared).
"""

import argparse
import functools
import gc
import itertools
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.experimental._paged_attention import PagedAttention as FlexPages
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.ceilings import Ceilings
from benchmarks.report import Table, header, show_header
from chatpage.model.attention import AttentionCall
from chatpage.model.batch import Batch, Row
from chatpage.model.kv import KVPool, LayerShape

RUNS = 7
GRAPH_SECONDS = 1e-3  # so much work in a graph: long beside its launch
FEWEST_SECONDS = 4e-6  # a call takes that long however little it reads
MOST_CALLS = 256
L2_TIMES = 4  # a graph reads so many times what the L2 holds
MOST_SETS = 8
CHECKED = 8  # sessions whose answers are compared
HEAD_START = 20_000_000  # cycles that the GPU waits, so that all replays are queued when the first one begins

BLOCK_SIZE = 16
ALLOWED = 1.03  # the choice over the better of the two it chooses from


@dataclass(frozen=True, slots=True)
class Heads:
    query: int
    kv: int
    size: int = 128


@dataclass(frozen=True, slots=True)
class Case:
    """Sessions that each see `shared` tokens which all have in common, and `own` of their own."""

    sessions: int
    shared: int
    own: int

    @property
    def context(self) -> int:
        return self.shared + self.own

    @property
    def name(self) -> str:
        return f"{self.sessions} × ({self.shared:,} + {self.own})" if self.shared else f"{self.sessions} × {self.own:,}"


LLAMA, SMALL = Heads(32, 8), Heads(16, 8)  # Llama-3-8B and Qwen3-8B; Qwen3-0.6B

# performance.md: least share of the copy ceiling; FlashAttention-3 there, as vLLM ships it, µs.
DECODE = {
    Case(1, 0, 8192): (0.45, 18),
    Case(1, 0, 32_768): (0.75, 43),
    Case(16, 0, 2048): (0.82, 38),
    Case(16, 0, 8192): (0.95, 129),
    Case(64, 0, 512): (0.82, 45),
    Case(64, 0, 2048): (0.94, 133),
    Case(64, 0, 8192): (0.98, 494),
    Case(256, 0, 2048): (0.96, 522),
}
# The same for shared prefixes: most µs; FlashAttention-3 plain, and as a cascade.
SHARED = {
    Case(16, 2048, 128): (20, 30, 26),
    Case(64, 512, 128): (30, 42, 38),
    Case(64, 2048, 128): (32, 95, 45),
    Case(64, 8192, 128): (45, 310, 56),
    Case(256, 512, 128): (65, 143, 84),
    Case(256, 2048, 128): (75, 352, 103),
    Case(256, 2048, 512): (160, 423, 186),
}
GRID = ((2, 4, 8, 16, 32, 64, 128, 256), (64, 128, 256, 512, 1024, 2048, 8192), (32, 128, 512))
SUBSET = ((2, 16, 64, 256), (64, 256, 1024, 8192), (32, 512))

TINY = (Case(1, 0, 40), Case(3, 0, 70), Case(2, 16, 5), Case(5, 64, 20), Case(4, 160, 33))

WAYS: dict[str, bool | None] = {"chosen": None, "on": True, "off": False}


class Stage:
    """A pool with random keys and values in every block, and batches of decodes on scattered blocks of it."""

    def __init__(self, heads: Heads, *, layers: int, blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        self.heads, self.device, self.dtype, self.layers = heads, device, dtype, layers
        shape = LayerShape(heads.kv, heads.size, heads.size)
        self.pool = KVPool((shape,) * layers, blocks, BLOCK_SIZE, device, dtype)
        for tensor in (*self.pool.keys, *self.pool.values):
            tensor.normal_()
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0

    def bytes_of(self, tokens: int) -> int:
        """Keys and values of so many tokens in one layer."""
        return 2 * tokens * self.heads.kv * self.heads.size * self.dtype.itemsize

    def read_once(self, case: Case) -> int:
        return self.bytes_of(case.shared + case.sessions * case.own)

    def batches(self, case: Case) -> list[Batch]:
        """The same sessions on other blocks, so often that they do not fit into the L2 together."""
        shared, own = case.shared // BLOCK_SIZE, -(-case.own // BLOCK_SIZE)
        wanted = math.ceil(L2_TIMES * self.l2 / (self.layers * self.read_once(case)))
        possible = self.pool.num_blocks // (shared + case.sessions * own)
        scattered = iter((torch.randperm(self.pool.num_blocks) + 1).tolist())
        batches = []
        for _ in range(max(1, min(wanted, possible, MOST_SETS))):
            common = list(itertools.islice(scattered, shared))
            tables = [common + list(itertools.islice(scattered, own)) for _ in range(case.sessions)]
            rows = [Row([7], case.context - 1, table) for table in tables]
            batches.append(Batch.build(rows, block_size=BLOCK_SIZE, device=self.device))
        return batches

    def query(self, sessions: int) -> Tensor:
        return torch.randn(sessions, self.heads.query, self.heads.size, device=self.device, dtype=self.dtype)


# -- how it is timed ---------------------------------------------------------------------------------------------------

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Calls:
    """Many calls as one thing that can be run again and again, on a GPU as a graph.

    Attributes:
        once: each of them; they own the memory that the graph reads and writes.
    """

    replay: Callable[[], object]
    count: int
    once: Sequence[Call]

    @classmethod
    def capture(cls, once: Sequence[Call], least_seconds: float, device: torch.device) -> "Calls":
        """Each of them once, and again until there is enough to do."""
        rounds = math.ceil(GRAPH_SECONDS / (max(least_seconds, FEWEST_SECONDS) * len(once)))
        rounds = max(1, min(rounds, MOST_CALLS // len(once)))

        def work(rounds: int) -> None:
            for _ in range(rounds):
                for call in once:
                    call()

        if device.type != "cuda":
            return cls(functools.partial(work, 1), len(once), once)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles what must be compiled
            work(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work(rounds)
        return cls(graph.replay, rounds * len(once), once)


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call."""

    micros: float
    spread: str


def race(calls: dict[str, Calls], device: torch.device) -> dict[str, Timing]:
    """Times of several that take turns, so that what else goes on hits them alike."""
    is_gpu = device.type == "cuda"
    order = [name for _ in range(RUNS if is_gpu else 1) for name in calls]
    clock = _race_on_gpu if is_gpu else _race_on_cpu
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, took in zip(order, clock([calls[name].replay for name in order]), strict=True):
        seconds[name].append(took / calls[name].count)
    return {name: _timing(took) for name, took in seconds.items()}


def _race_on_gpu(replays: list[Callable[[], object]]) -> list[float]:
    for replay in dict.fromkeys(replays):  # warm up
        replay()
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(replays) + 1)]
    events[0].record()
    for replay, event in zip(replays, events[1:], strict=True):
        replay()
        event.record()
    torch.cuda.synchronize()
    return [begun.elapsed_time(ended) / 1000 for begun, ended in itertools.pairwise(events)]


def _race_on_cpu(replays: list[Callable[[], object]]) -> list[float]:
    seconds = []
    for replay in replays:
        begun = time.perf_counter()
        replay()
        seconds.append(time.perf_counter() - begun)
    return seconds


def _timing(seconds: list[float]) -> Timing:
    middle = statistics.median(seconds)
    return Timing(1e6 * middle, f"{min(seconds) / middle:.2f}–{max(seconds) / middle:.2f}")


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(stage: Stage, case: Case, ceilings: Ceilings, ways: dict[str, bool | None]) -> tuple[dict[str, Timing], float]:
    """Times of our kernels in some ways, and the largest error of any of them."""
    from chatpage.model.paged import PagedAttention  # late: without Triton the other tables are of use too

    query, batches = stage.query(case.sessions), stage.batches(case)
    calls, errors = {}, []
    for name, shared in ways.items():
        readers = [PagedAttention(stage.pool, batch, shared=shared) for batch in batches]
        once = [functools.partial(_read, reader, layer, query) for reader in readers for layer in range(stage.layers)]
        errors.append(error(stage, case, batches[0], query, once[0]()))
        calls[name] = Calls.capture(once, stage.read_once(case) / ceilings.copy, stage.device)
    return race(calls, stage.device), max(errors)


def _read(reader: Any, layer: int, query: Tensor) -> Tensor:
    scaling = query.shape[-1] ** -0.5
    return reader.read(layer, query, AttentionCall(scaling))


def error(stage: Stage, case: Case, batch: Batch, query: Tensor, found: object) -> float:
    """How far answers of the first layer are from attention in fp32, over the first and last sessions."""
    assert isinstance(found, Tensor)
    assert found.shape == query.shape, found.shape
    rows = sorted(
        {*range(min(CHECKED // 2, case.sessions)), *range(max(0, case.sessions - CHECKED // 2), case.sessions)}
    )
    keys, values = (blocks[0] for blocks in (stage.pool.keys, stage.pool.values))
    missing = norm = 0.0
    for row in rows:
        table = torch.tensor(batch.rows[row].table, device=stage.device)
        key, value = (t[table].flatten(0, 1)[: case.context].transpose(0, 1).float() for t in (keys, values))
        grouped = query[row].float().view(stage.heads.kv, -1, stage.heads.size)
        weights = (grouped @ key.transpose(1, 2) * stage.heads.size**-0.5).softmax(-1)
        expected = (weights @ value).flatten(0, 1)
        missing += float((found[row].float() - expected).square().sum())
        norm += float(expected.square().sum())
    return math.sqrt(missing / norm)


# -- peers -------------------------------------------------------------------------------------------------------------


def contiguous(stage: Stage, case: Case, ceilings: Ceilings) -> Timing:
    """PyTorch's attention, each session's keys and values side by side, as `generate` has them."""
    heads, layers = stage.heads, min(stage.layers, 8)
    shape = (case.sessions, heads.kv, case.context, heads.size)
    pairs = [[torch.randn(shape, device=stage.device, dtype=stage.dtype) for _ in range(2)] for _ in range(layers)]
    query = stage.query(case.sessions)[:, :, None]
    once = [functools.partial(F.scaled_dot_product_attention, query, *pair, enable_gqa=True) for pair in pairs]
    least = stage.bytes_of(case.sessions * case.context) / ceilings.copy
    return race({"": Calls.capture(once, least, stage.device)}, stage.device)[""]


def flex(case: Case, heads: Heads, page: int, ceilings: Ceilings, device: torch.device, dtype: torch.dtype) -> Timing:
    """PyTorch's FlexAttention over its own pages. All of them are full, which spares it all masks."""
    pages = case.sessions * case.context // page
    paged = FlexPages(pages, page, case.sessions, device=str(device))
    scattered = torch.randperm(pages).tolist()
    paged.empty_pages = scattered
    for session in range(case.sessions):
        paged.reserve(torch.tensor(session, device=device), torch.tensor(case.context, device=device))
    per_session = case.context // page
    counts = torch.full((case.sessions, 1, 1), per_session, dtype=torch.int32, device=device)
    indices = torch.arange(per_session, dtype=torch.int32, device=device).expand(case.sessions, 1, 1, -1).contiguous()
    nothing = torch.zeros_like(counts), torch.zeros_like(indices)
    logical = BlockMask.from_kv_blocks(*nothing, counts, indices, BLOCK_SIZE=(128, page), seq_lengths=(1, case.context))
    mask = paged.convert_logical_block_mask(logical)
    shape = (1, heads.kv, pages * page, heads.size)
    pairs = [[torch.randn(shape, device=device, dtype=dtype) for _ in range(2)] for _ in range(8)]
    query = torch.randn(case.sessions, heads.query, 1, heads.size, device=device, dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    once = [functools.partial(compiled, query, *pair, block_mask=mask, enable_gqa=True) for pair in pairs]
    least = 2 * math.prod(shape) * dtype.itemsize / ceilings.copy
    return race({"": Calls.capture(once, least, device)}, device)[""]


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bench:
    """Where it runs and how it is told."""

    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    as_json: bool
    whole_grid: bool

    def table(self, title: str) -> Table:
        return Table(title, as_json=self.as_json)

    def stage(self, heads: Heads, *, layers: int, cases: Sequence[Case]) -> Stage:
        """With room for the largest of the cases."""
        blocks = max((case.shared + case.sessions * (case.own + BLOCK_SIZE)) // BLOCK_SIZE for case in cases)
        return Stage(heads, layers=layers, blocks=blocks, device=self.device, dtype=self.dtype)

    def micros(self, size: int) -> float:
        """The time to read so many bytes at the copy ceiling."""
        return 1e6 * size / self.ceilings.copy


def decode(bench: Bench) -> None:
    table = bench.table("Paged decode: 32 query heads, 8 KV heads of 128, blocks of 16, µs of one layer")
    stage = bench.stage(LLAMA, layers=8, cases=list(DECODE))
    for case, (goal, flash) in DECODE.items():
        times, wrong = ours(stage, case, bench.ceilings, {"chosen": None})
        found, limit = times["chosen"], bench.micros(stage.read_once(case))
        share = limit / found.micros
        row = {"sessions × context": case.name, "µs": found.micros, "spread": found.spread, "limit": limit}
        row |= {"of the copy ceiling": share, "goal": f"≥ {goal}", "met": _yes(share >= goal), "error": wrong}
        beside = _or_reason(lambda case=case: contiguous(stage, case, bench.ceilings).micros)
        table.add({**row, "SDPA, contiguous": beside, "FlashAttention-3 (performance.md)": flash})
        torch.cuda.empty_cache()


def shared(bench: Bench) -> None:
    table = bench.table("Shared prefix: the same heads, blocks physically shared, µs of one layer")
    stage = bench.stage(LLAMA, layers=16, cases=list(SHARED))
    for case, (goal, plain, cascade) in SHARED.items():
        times, wrong = ours(stage, case, bench.ceilings, WAYS)
        chosen = times["chosen"].micros
        products = 4e6 * case.sessions * stage.heads.query * case.shared * stage.heads.size / bench.ceilings.products
        table.add(
            {
                "sessions × (shared + own)": case.name,
                **{f"{name} µs": timing.micros for name, timing in times.items()},
                "spread": times["chosen"].spread,
                "private limit": bench.micros(stage.bytes_of(case.sessions * case.context)),
                "shared limit": bench.micros(stage.read_once(case)),
                "products with shared": products,
                "goal": f"≤ {goal}",
                "met": _yes(chosen <= goal),
                "error": wrong,
                "FlashAttention-3, cascade (performance.md)": f"{plain}, {cascade}",
            }
        )


def choice(bench: Bench) -> None:
    title = "Choice: the shared-prefix kernel forced on, forced off, and as chosen, µs of one layer"
    table = bench.table(title)
    cases = [Case(*numbers) for numbers in itertools.product(*(GRID if bench.whole_grid else SUBSET))]
    for heads in (LLAMA, SMALL):
        stage = bench.stage(heads, layers=16, cases=cases)
        for case in cases:
            times, wrong = ours(stage, case, bench.ceilings, WAYS)
            micros = {name: timing.micros for name, timing in times.items()}
            table.add(
                {
                    "heads": f"{heads.query}/{heads.kv}",
                    "sessions × (shared + own)": case.name.ljust(20),
                    **{name: micros[name] for name in ("on", "off", "chosen")},
                    "chosen / better": micros["chosen"] / min(micros["on"], micros["off"]),
                    "spread": times["chosen"].spread,
                    "shared limit": bench.micros(stage.read_once(case)),
                    "error": wrong,
                }
            )
        del stage
        torch.cuda.empty_cache()
    worst = max(table.rows, key=lambda row: row["chosen / better"])
    ratio = worst["chosen / better"]
    above = sum(row["chosen / better"] > ALLOWED for row in table.rows)
    bench.table("Choice, the worst").add(
        {
            "cases": len(table.rows),
            "worst": ratio,
            "where": f"{worst['heads']} {worst['sessions × (shared + own)'].strip()}",
            "goal": f"≤ {ALLOWED}",
            "met": _yes(ratio <= ALLOWED),
            "cases above": above,
        }
    )


def flexible(bench: Bench) -> None:
    """Last, because each shape compiles for seconds."""
    table = bench.table("FlexAttention over pages (PyTorch), µs of one layer; the same shapes as paged decode")
    pages = [BLOCK_SIZE, 128]
    for case in DECODE:
        found: object = ""
        while pages:
            found = _or_reason(lambda case=case: flex(case, LLAMA, pages[0], bench.ceilings, bench.device, bench.dtype))
            torch.cuda.empty_cache()
            if isinstance(found, Timing):
                break
            table.add(_flex_row(case, pages.pop(0), found, bench))
        if isinstance(found, Timing):
            table.add(_flex_row(case, pages[0], found, bench))


def _flex_row(case: Case, page: int, found: object, bench: Bench) -> dict[str, Any]:
    limit = bench.micros(2 * case.sessions * case.context * LLAMA.kv * LLAMA.size * bench.dtype.itemsize)
    row = {"sessions × context": case.name.ljust(12), "page": f"{page:3}"}
    if isinstance(found, Timing):
        share = limit / found.micros
        return {**row, "µs": found.micros, "spread": found.spread, "limit": limit, "of the copy ceiling": share}
    return {**row, "µs": found, "spread": None, "limit": limit, "of the copy ceiling": None}


def sanity(bench: Bench) -> None:
    """Answers of tiny shapes in all ways, and that timing them works."""
    table = bench.table("Sanity: answers of tiny shapes; the times mean nothing")
    for heads in (Heads(4, 2, 64), Heads(2, 2, 64)):
        stage = bench.stage(heads, layers=2, cases=TINY)
        for case in TINY:
            for name, forced in WAYS.items():
                times, wrong = ours(stage, case, bench.ceilings, {name: forced})
                right = _yes(wrong <= 20 * torch.finfo(bench.dtype).eps)
                row = {"heads": f"{heads.query}/{heads.kv}", "case": case.name.ljust(14), "shared": name.ljust(6)}
                table.add(row | {"error": wrong, "right": right.ljust(5), "µs": times[name].micros})


def _or_reason(work: Callable[[], Any]) -> Any:
    """What it gives, or why it did not run: a peer that fails does not end the benchmark."""
    try:
        return work()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"did not run: {lines[0][:100]}"


def _yes(met: bool) -> str:
    return "yes" if met else "no"


TABLES: dict[str, Callable[[Bench], None]] = {"decode": decode, "shared": shared, "choice": choice, "flex": flexible}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="these tables")
    parser.add_argument("--grid", action="store_true", help="the choice over its whole grid")
    parser.add_argument("--sanity", action="store_true", help="tiny shapes only, also on a CPU")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    gc.freeze()  # each capture collects garbage first, and looks at all that was imported otherwise
    torch.manual_seed(0)
    if not torch.cuda.is_available() and not chosen.sanity:
        sys.exit("benchmarks.kernels needs a CUDA GPU; --sanity runs tiny shapes on a CPU (TRITON_INTERPRET=1).")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = Ceilings.measure(device, dtype)
    show_header(header(**ceilings.about(), dtype=str(dtype), runs=RUNS), as_json=chosen.json)
    bench = Bench(device, dtype, ceilings, chosen.json, chosen.grid)
    well = True
    for table in [sanity] if chosen.sanity else [TABLES[name] for name in chosen.only]:
        try:
            table(bench)
        except Exception:  # the other tables are of use all the same
            traceback.print_exc()
            well = False
    if not well:
        sys.exit(1)


if __name__ == "__main__":
    main()
