"""Who computes which part of a step's attention: tasks for the kernels, worked out once a step on the host.

    row 0   ├─────── shared ───────┼── own ──┤             decodes; a group shares blocks: its shared keys are split
    row 1   ├─────── shared ───────┼───── own ─────┤       into shared tasks, each row's own ones into own tasks
    row 2   ├── own ──┤
    row 3   ├────────────── seen ──────┤ chunk ├           a chunk: tiles of its queries

The kernels read all of it from device memory, so that a captured step can be replayed with another plan.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chatpage.cache.prefix import common_length
from chatpage.model.batch import Row, inverse

Ints = NDArray[np.int32]

# So many programs per multiprocessor keep a GPU busy, while two run side by side; but none should have fewer keys.
OWN_PROGRAMS, OWN_KEYS = 4, 128
SHARED_PROGRAMS, SHARED_KEYS = 2, 128
TILE = 64  # keys: shared tasks end at multiples of it; what is left of the shared ones each row reads for itself

# What things take, in the time in which a program attends to a tile of keys, fitted to 336 cases measured on an H200:
# so many tiles can be read side by side by each multiprocessor; keys that several rows read for themselves come from
# its cache mostly; a merge begins, and handles so many heads meanwhile; own tasks take longer beside shared ones.
READ_AT_ONCE, CACHED, MERGE, MERGED_AT_ONCE, BESIDE = 2.8, 0.76, 0.74, 3800, 1.12
LEAST_SAVED = 256  # keys, where a single launch would do

# Chunks of so few tokens, each behind so many, are computed as decodes.
MOST_APART, LEAST_BEFORE = 128, 512

OWN_FIELDS, ROW_FIELDS, SHARED_FIELDS, CHUNK_FIELDS = 4, 8, 8, 4  # columns of the tables in `Plan`


class Kind(NamedTuple):
    """What layers must have in common to use the same plan."""

    heads: int
    kv_heads: int
    window: int | None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Sharing:
    """Decodes that begin with the same blocks.

    Attributes:
        rows: of the step, at least two.
        tokens: how many leading tokens they share: a multiple of TILE, less than the shortest context.
    """

    rows: list[int]
    tokens: int

    @property
    def saved(self) -> int:
        """Keys that need not be read again."""
        return (len(self.rows) - 1) * self.tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """Tables of int32, as the kernels read them.

    Attributes:
        own: (tasks, 4), see `chatpage.kernels.decode.attend_decodes`.
        rows: (decodes, 8), see `chatpage.kernels.merge.merge`.
        shared: (tasks, 8), see `chatpage.kernels.shared.attend_shared`; members: (members,).
        chunks: (tasks, 4), see `chatpage.kernels.prefill.attend_chunks`.
        shared_rows: of a shared task's matrix.
    """

    own: Ints
    rows: Ints
    shared: Ints
    members: Ints
    chunks: Ints
    shared_rows: int

    @classmethod
    def empty(cls) -> "Plan":
        """Of a step without rows."""
        own, rows, shared, chunks = (
            np.zeros((0, fields), dtype=np.int32) for fields in (OWN_FIELDS, ROW_FIELDS, SHARED_FIELDS, CHUNK_FIELDS)
        )
        return cls(own, rows, shared, np.zeros(0, dtype=np.int32), chunks, shared_rows=16)

    @property
    def most_states(self) -> int:
        """That a row's answer is merged from."""
        return int((self.rows[:, 1] + self.rows[:, 3]).max(initial=0))


def make_plan(
    rows: Sequence[Row],
    tables: Sequence[int],
    groups: list[Sharing],
    kind: Kind,
    *,
    room: int,
    processors: int,
    queries: int,
    always: bool = False,
) -> Plan:
    """Split a step's attention into tasks.

    Args:
        rows: decodes first.
        tables: where each row's block table begins.
        groups: decodes that share their leading keys: these are read once where that is faster, or `always`.
        room: for how many decodes the shared tasks are made: no fewer than there are.
        processors: multiprocessors of the device.
        queries: of a chunk's task, at most.
    """
    decodes = count_decodes(rows)
    shared_rows = rows_of_shared(room, kind.group)
    contexts = np.array([row.context for row in rows[:decodes]], dtype=np.int64)
    begins = np.zeros(decodes, dtype=np.int64)
    if kind.window is not None:
        begins, groups = np.maximum(contexts - kind.window, 0), []
    elif groups and not always and not _pays(contexts, groups, kind, processors, shared_rows // kind.group):
        groups = []
    notes = np.zeros((decodes, ROW_FIELDS), dtype=np.int32)
    own_wanted, shared_wanted = tasks_wanted(kind, processors)
    shared, members = _share(groups, tables, notes, begins, contexts, shared_rows // kind.group, shared_wanted)
    return Plan(
        own=_split(begins, contexts, tables, notes, own_wanted),
        rows=notes,
        shared=shared,
        members=members,
        chunks=_tiles(rows, tables, decodes, queries),
        shared_rows=shared_rows,
    )


def count_decodes(rows: Sequence[Row]) -> int:
    return sum(len(row.tokens) == 1 for row in rows)


def tasks_wanted(kind: Kind, processors: int) -> tuple[int, int]:
    """How many own tasks, and how many shared ones, keep the device busy: each is a program for every KV head."""
    return max(1, OWN_PROGRAMS * processors // kind.kv_heads), max(1, SHARED_PROGRAMS * processors // kind.kv_heads)


def rows_of_shared(members: int, group: int) -> int:
    """Rows of a shared task's matrix: many where many share, since each task reads all its keys once."""
    needed = members * group
    return max(16, _power(group), min(_power(needed), 128 if needed > 256 else 64))


def _share(
    groups: list[Sharing],
    tables: Sequence[int],
    notes: Ints,
    begins: NDArray,
    contexts: NDArray,
    per_task: int,
    wanted: int,
) -> tuple[Ints, Ints]:
    """Shared tasks and members; tells `notes` where rows find their states, and `begins` where their own keys begin."""
    tasks: list[tuple[int, ...]] = []
    members: list[int] = []
    for sharing in groups:
        begins[sharing.rows] = sharing.tokens
    steps = _shared_steps(groups, per_task, int((contexts - begins).sum()), wanted)
    for sharing, step in zip(groups, steps, strict=True):
        edges = [*range(0, sharing.tokens, step), sharing.tokens]
        for first in range(0, len(sharing.rows), per_task):
            tile = sharing.rows[first : first + per_task]
            notes[tile, 2], notes[tile, 3], notes[tile, 4] = len(tasks), len(edges) - 1, range(len(tile))
            for begin, end in pairwise(edges):
                tasks.append((len(members), len(tile), begin, end, tables[tile[0]], 0, 0, 0))
            members += tile
    return np.array(tasks, dtype=np.int32).reshape(-1, SHARED_FIELDS), np.array(members, dtype=np.int32)


def _shared_steps(groups: list[Sharing], per_task: int, own_keys: int, wanted: int) -> list[int]:
    """Keys of each group's tasks. There are at most `wanted`, or one a tile; half, where the own keys are more work."""
    tiles = [-(-len(sharing.rows) // per_task) for sharing in groups]
    products = sum(count * sharing.tokens for count, sharing in zip(tiles, groups, strict=True))
    wanted = wanted if products > own_keys else wanted // 2
    splits = [max(1, min(wanted // sum(tiles), sharing.tokens // SHARED_KEYS)) for sharing in groups]
    return [_rounded(-(-group.tokens // count), TILE) for group, count in zip(groups, splits, strict=True)]


def _split(begins: NDArray, ends: NDArray, tables: Sequence[int], notes: Ints, wanted: int) -> Ints:
    """Own tasks of about equal length; tells `notes` which ones belong to whom."""
    lengths = ends - begins
    steps = _own_steps(lengths, wanted)
    splits = -(-lengths // steps)
    firsts = np.cumsum(splits) - splits
    notes[:, 0], notes[:, 1] = firsts, splits
    owners = np.repeat(np.arange(len(notes)), splits)
    starts = begins[owners] + (np.arange(len(owners)) - firsts[owners]) * steps[owners]
    ends = np.minimum(starts + steps[owners], ends[owners])
    return np.stack([owners, starts, ends, np.array(tables, dtype=np.int64)[owners]], axis=1).astype(np.int32)


def _own_steps(lengths: NDArray, wanted: int) -> NDArray:
    """Keys of each row's tasks. There are at most `wanted` more tasks than rows."""
    total = int(lengths.sum())
    aim = max(OWN_KEYS, 2 * total / wanted)  # all of them at once, if they are short then
    if aim > 2 * OWN_KEYS:
        aim = max(2 * OWN_KEYS, total / wanted)
    splits = np.maximum(1, np.rint(lengths / aim).astype(np.int64))
    return _rounded(-(-lengths // splits), TILE)


def _tiles(rows: Sequence[Row], tables: Sequence[int], decodes: int, queries: int) -> Ints:
    """Tiles of the chunks' queries."""
    tasks: list[tuple[int, ...]] = []
    token = decodes
    for row, table in zip(rows[decodes:], tables[decodes : len(rows)], strict=True):
        for first in range(0, len(row.tokens), queries):
            tasks.append((token + first, min(queries, len(row.tokens) - first), row.start + first, table))
        token += len(row.tokens)
    return np.array(tasks, dtype=np.int32).reshape(-1, CHUNK_FIELDS)


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _rounded(number, to: int):
    return -(-number // to) * to


# -- chunks as decodes ------------------------------------------------------------------------------------------------


def lay_out(rows: Sequence[Row], *, most: int) -> tuple[list[Row], list[int]]:
    """Decodes first; or nothing but decodes, one for each token, where that is faster than to have chunks.

    Args:
        most: how many decodes there may be.

    Returns:
        The rows, and where among them the last token of each given one is.
    """
    if _is_better_apart(rows, most):
        parts = [_apart(row) for row in rows]
        return list(chain.from_iterable(parts)), [end - 1 for end in accumulate(map(len, parts))]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    return [rows[i] for i in order], inverse(order)


def _is_better_apart(rows: Sequence[Row], most: int) -> bool:
    """A chunk's tile reads all keys before it one after the other; decodes that share them read them side by side."""
    chunks = [row for row in rows if len(row.tokens) > 1]
    tokens = sum(len(row.tokens) for row in chunks)
    return (
        0 < tokens <= MOST_APART
        and len(rows) - len(chunks) + tokens <= most
        and all(row.start >= LEAST_BEFORE for row in chunks)
    )


def _apart(row: Row) -> list[Row]:
    """A decode for each token. All of a step's keys and values are stored before anybody attends to them."""
    last = len(row.tokens) - 1
    if not last:
        return [row]
    return [
        Row([token], row.start + i, row.table, row.store, row.sample if i == last else None)
        for i, token in enumerate(row.tokens)
    ]


# -- who shares -------------------------------------------------------------------------------------------------------


def _pays(contexts: NDArray, groups: list[Sharing], kind: Kind, processors: int, per_task: int) -> bool:
    """Whether reading shared keys once, and merging, is faster than letting each row read them for itself."""
    own_wanted, shared_wanted = tasks_wanted(kind, processors)
    saved = np.zeros(len(contexts), dtype=np.int64)
    for sharing in groups:
        saved[sharing.rows] = sharing.tokens
    at_once = READ_AT_ONCE * processors / kind.kv_heads * TILE
    merge = MERGE + len(contexts) * kind.heads / MERGED_AT_ONCE

    alone_steps = _own_steps(contexts, own_wanted)
    alone = max(alone_steps.max() / TILE, (contexts - saved + CACHED * saved).sum() / at_once)
    if (alone_steps < contexts).any():
        alone += merge
    elif sum(sharing.saved for sharing in groups) < LEAST_SAVED:
        return False

    tiles = [-(-len(sharing.rows) // per_task) for sharing in groups]
    longest = max(_shared_steps(groups, per_task, int((contexts - saved).sum()), shared_wanted))
    products = sum(count * sharing.tokens for count, sharing in zip(tiles, groups, strict=True))
    own = contexts - saved
    own_time = max(_own_steps(own, own_wanted).max() / TILE, own.sum() / at_once)
    return max(BESIDE * own_time, longest / TILE, products / at_once) + merge < alone


def find_sharing(rows: Sequence[Row], starts: Sequence[int], tables: Ints, block_size: int) -> list[Sharing]:
    """Groups of decodes that begin with the same blocks, so that as many reads as possible are saved.

    Tables form a tree. At each fork either all share what they have in common, or each branch shares what it has for
    itself, whatever saves more.

        [3, 4, 9]  [3, 4, 7]  [3, 8]        all: 2 · 1 block        the first two: 1 · 2 blocks

    Args:
        rows: decodes first.
        starts: where in `tables` each row's block table begins.
    """
    decodes = rows[: count_decodes(rows)]
    own = [row.start // block_size for row in decodes]  # the block of the token itself is always a row's own
    return _best(_Tables(tables, starts), own, list(range(len(decodes))), 0, block_size)


def _best(tables: "_Tables", counts: list[int], among: list[int], known: int, block_size: int) -> list[Sharing]:
    """The best groups of rows whose first `known` blocks are the same.

    Args:
        counts: how many leading blocks each row may share.
    """
    found: list[Sharing] = []
    among = [row for row in among if counts[row] > known]
    for branch in tables.branches(among, known):
        common = tables.common(branch, min(counts[row] for row in branch))
        whole = Sharing(branch, common * block_size // TILE * TILE)
        parts = _best(tables, counts, branch, common, block_size)
        if sum(part.saved for part in parts) > whole.saved:
            found += parts
        elif whole.tokens:
            found.append(whole)
    return found


class _Tables:
    """Block tables as bytes: two of them are compared by one call."""

    def __init__(self, tables: Ints, starts: Sequence[int]) -> None:
        self._bytes = tables.tobytes()
        self._numbers = memoryview(self._bytes).cast("i")
        self._starts = starts

    def branches(self, among: list[int], known: int) -> list[list[int]]:
        """Those of the rows that have the next block in common with others."""
        branches: dict[int, list[int]] = defaultdict(list)
        for row in among:
            branches[self._numbers[self._starts[row] + known]].append(row)
        return [branch for branch in branches.values() if len(branch) > 1]

    def common(self, branch: list[int], most: int) -> int:
        """How many leading blocks all of these rows have in common, at most so many."""
        first = self._starts[branch[0]]
        shared = self._bytes[4 * first : 4 * (first + most)]
        for row in branch[1:]:
            start = self._starts[row]
            if not self._bytes.startswith(shared, 4 * start):
                most = common_length(self._numbers[first : first + most], self._numbers[start : start + most])
                shared = shared[: 4 * most]
        return most
