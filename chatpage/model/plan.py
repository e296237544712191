"""Who computes which part of a step's attention: tasks for the kernels, worked out once a step on the host.

    row 0   ├─────── shared ───────┼── own ──┤
    row 1   ├─────── shared ───────┼───── own ─────┤       a group: its shared keys are split into shared tasks,
    row 2   ├── own ──┤                                    each row's own ones into own tasks
    row 3   ├────────────── seen ──────┤ chunk ├           a chunk: tiles of its queries

The kernels read all of it from device memory, so that a captured step can be replayed with another plan.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatpage.model.batch import Batch, Row

Ints = NDArray[np.int32]

OWN_KEYS = 128  # no own task has fewer, if it can be helped
SHARED_KEYS = 128  # nor a shared one
SHARED_ROWS = 64  # rows of a shared task's matrix at most


@dataclass(frozen=True, slots=True)
class Machine:
    """How much work keeps the device busy.

    Attributes:
        programs: that run side by side.
    """

    programs: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """Decodes that begin with the same blocks.

    Attributes:
        rows: of the batch, at least two.
        tokens: how many leading tokens lie in those blocks: less than the shortest context.
    """

    rows: list[int]
    tokens: int

    @property
    def saved(self) -> int:
        """Keys that need not be read again."""
        return (len(self.rows) - 1) * self.tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """Tables of int32 as `chatpage.kernels` reads them.

    Attributes:
        own: (tasks, 4), see `decode.attend_decodes`.
        rows: (decodes, 8), see there.
        shared: (tasks, 4), see `shared.attend_shared`; members: (members,).
        shared_rows: of a shared task's matrix.
        chunks: (tasks, 4), see `prefill.attend_chunks`.
    """

    own: Ints
    rows: Ints
    shared: Ints
    members: Ints
    shared_rows: int
    chunks: Ints


def make_plan(
    batch: Batch, groups: list[Sharing], *, heads: int, kv_heads: int, window: int | None, programs: int, queries: int
) -> Plan:
    """Split a step's attention into tasks.

    Args:
        batch: its decodes come first.
        groups: whose leading keys are read once; none under a window.
        programs: how many keep the device busy.
        queries: of a chunk's task, at most.
    """
    decodes = sum(len(row.tokens) == 1 for row in batch.rows)
    contexts = np.array([row.context for row in batch.rows[:decodes]], dtype=np.int64)
    rows = np.zeros((decodes, 8), dtype=np.int32)
    shared_rows = _shared_rows(groups, heads // kv_heads)
    begins = np.zeros(decodes, dtype=np.int64) if window is None else np.maximum(contexts - window, 0)
    shared, members = _share(groups, rows, begins, shared_rows * kv_heads // heads, programs // kv_heads)
    return Plan(
        own=_split(begins, contexts, rows, programs // kv_heads),
        rows=rows,
        shared=shared,
        members=members,
        shared_rows=shared_rows,
        chunks=_tiles(batch, decodes, queries),
    )


def _shared_rows(groups: list[Sharing], group: int) -> int:
    """The largest group's matrix, or as much of it as a program holds."""
    largest = max((len(sharing.rows) for sharing in groups), default=1) * group
    return min(max(16, 1 << (largest - 1).bit_length()), max(SHARED_ROWS, 1 << (group - 1).bit_length()))


def _share(groups: list[Sharing], rows: Ints, begins: NDArray, per_task: int, tasks_wanted: int) -> tuple[Ints, Ints]:
    """Shared tasks and their members; notes in `rows` who finds what, and in `begins` where own keys begin."""
    tasks: list[tuple[int, int, int, int]] = []
    members: list[int] = []
    tiles = sum(-(-len(sharing.rows) // per_task) for sharing in groups)
    for sharing in groups:
        splits = max(1, min(tasks_wanted // tiles, sharing.tokens // SHARED_KEYS))
        length = _rounded(-(-sharing.tokens // splits), 64)
        splits = -(-sharing.tokens // length)
        for first in range(0, len(sharing.rows), per_task):
            tile = sharing.rows[first : first + per_task]
            rows[tile, 2], rows[tile, 3], rows[tile, 4] = len(tasks), splits, range(len(tile))
            begins[tile] = sharing.tokens
            for begin in range(0, sharing.tokens, length):
                tasks.append((len(members), len(tile), begin, min(begin + length, sharing.tokens)))
            members += tile
    return np.array(tasks, dtype=np.int32).reshape(-1, 4), np.array(members, dtype=np.int32)


def _split(begins: NDArray, ends: NDArray, rows: Ints, tasks_wanted: int) -> Ints:
    """Own tasks of about equal length; notes in `rows` which ones belong to whom."""
    lengths = ends - begins
    length = _rounded(max(OWN_KEYS, -(-int(lengths.sum()) // max(tasks_wanted, 1))), 64)
    splits = -(-lengths // length)
    firsts = np.cumsum(splits) - splits
    rows[:, 0], rows[:, 1] = firsts, splits
    tasks = np.zeros((int(splits.sum()), 4), dtype=np.int32)
    owners = np.repeat(np.arange(len(rows)), splits)
    tasks[:, 0] = owners
    tasks[:, 1] = begins[owners] + (np.arange(len(tasks)) - firsts[owners]) * length
    tasks[:, 2] = np.minimum(tasks[:, 1] + length, ends[owners])
    return tasks


def _tiles(batch: Batch, decodes: int, queries: int) -> Ints:
    """Tiles of the chunks' queries."""
    tasks = []
    token = decodes
    for index, row in enumerate(batch.rows[decodes:], decodes):
        for first in range(0, len(row.tokens), queries):
            tasks.append((index, token + first, min(queries, len(row.tokens) - first), row.start + first))
        token += len(row.tokens)
    return np.array(tasks, dtype=np.int32).reshape(-1, 4)


def _rounded(number: int, to: int) -> int:
    return -(-number // to) * to


# -- who shares -------------------------------------------------------------------------------------------------------


def find_sharing(batch: Batch) -> list[Sharing]:
    """Groups of decodes that begin with the same blocks, so that as many reads as possible are saved.

    Tables form a tree: those that go on alike for longer are closer. At each fork either all of them share what they
    have in common, or each branch shares what it has for itself, whatever saves more.

        [3, 4, 9]  [3, 4, 7]  [3, 8]        all: 2 · 1 block        the first two: 1 · 2 blocks
    """
    decodes = [i for i, row in enumerate(batch.rows) if len(row.tokens) == 1]
    return _best(batch.rows, decodes, 0, batch.block_size)


def _best(rows: list[Row], among: list[int], known: int, block_size: int) -> list[Sharing]:
    """The best groups of rows whose first `known` blocks are the same."""
    found: list[Sharing] = []
    branches: dict[int, list[int]] = defaultdict(list)
    for i in among:
        if (rows[i].context - 1) // block_size > known:  # the token itself is always a row's own
            branches[rows[i].table[known]].append(i)
    for branch in branches.values():
        if len(branch) > 1:
            common = _common(rows, branch, block_size)
            whole = Sharing(branch, common * block_size)
            parts = _best(rows, branch, common, block_size)
            found += parts if sum(part.saved for part in parts) > whole.saved else [whole]
    return found


def _common(rows: list[Row], among: list[int], block_size: int) -> int:
    """How many leading blocks all of these rows have in common, each less than its context."""
    first = rows[among[0]].table
    common = min((rows[i].context - 1) // block_size for i in among)
    for i in among[1:]:
        table = rows[i].table
        if first[:common] != table[:common]:
            common = next(at for at in range(common) if first[at] != table[at])
    return common
