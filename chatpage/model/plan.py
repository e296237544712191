"""Who computes which part of a step's attention: tasks for the kernels, worked out once a step on the host.

    row 0   ├─────── shared ───────┼── own ──┤             decodes; a group shares blocks: its shared keys are split
    row 1   ├─────── shared ───────┼───── own ─────┤       into shared tasks, each row's own ones into own tasks
    row 2   ├── own ──┤
    row 3   ├────────────── seen ──────┤ chunk ├           a chunk: tiles of its queries

The kernels read all of it from device memory, so that a captured step can be replayed with another plan.
"""

from array import array
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chatpage.cache.prefix import common_length
from chatpage.model.batch import Row, inverse
from chatpage.model.flat import FlatRows

Ints = NDArray[np.int32]

# So many programs per multiprocessor keep a GPU busy, while two run side by side; but none should have fewer keys.
OWN_PROGRAMS, OWN_KEYS = 4, 128
SHARED_PROGRAMS, SHARED_KEYS = 2, 128
TILE = 64  # keys: shared tasks end at multiples of it; what is left of the shared ones each row reads for itself

# What things take, in the time in which a program attends to a tile of keys, fitted to 336 cases measured on an H200:
# so many tiles can be read side by side by each multiprocessor; keys that several rows read for themselves come from
# its cache mostly; a merge begins, and handles so many heads meanwhile; own tasks take longer beside shared ones; and
# the two part and meet.
READ_AT_ONCE, CACHED, MERGE, MERGED_AT_ONCE, BESIDE, PARTING = 2.75, 0.79, 1.35, 2030, 1.02, 0.98

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
    rows: FlatRows,
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
        groups: decodes that share their leading keys: these are read once where that is faster, or `always`.
        room: for how many decodes the shared tasks are made: no fewer than there are.
        processors: multiprocessors of the device.
        queries: of a chunk's task, at most.
    """
    shared_rows = rows_of_shared(room, kind.group)
    per_task = shared_rows // kind.group
    contexts, heads = rows.contexts[: rows.decodes], rows.heads[: rows.decodes]
    begins = np.zeros_like(contexts)
    for sharing in groups:
        begins[sharing.rows] = sharing.tokens
    if kind.window is not None:
        groups, begins = [], np.maximum(contexts - kind.window, 0)
    elif groups and not always and not _pays(contexts, begins, groups, kind, processors, per_task):
        groups, begins = [], np.zeros_like(contexts)
    notes = np.zeros((rows.decodes, ROW_FIELDS), dtype=np.int32)
    own_wanted, shared_wanted = tasks_wanted(kind, processors)
    steps = _shared_steps(groups, per_task, int((contexts - begins).sum()), shared_wanted)
    shared, members = _share(groups, steps, heads, notes, per_task)
    return Plan(
        own=_split(begins, contexts, heads, notes, own_wanted),
        rows=notes,
        shared=shared,
        members=members,
        chunks=_tiles(rows, queries),
        shared_rows=shared_rows,
    )


def tasks_wanted(kind: Kind, processors: int) -> tuple[int, int]:
    """How many own tasks, and how many shared ones, keep the device busy: each is a program for every KV head."""
    return max(1, OWN_PROGRAMS * processors // kind.kv_heads), max(1, SHARED_PROGRAMS * processors // kind.kv_heads)


def rows_of_shared(members: int, group: int) -> int:
    """Rows of a shared task's matrix: many where many share, since each task reads all its keys once."""
    needed = members * group
    return max(16, _power(group), min(_power(needed), 128 if needed > 256 else 64))


def _share(groups: list[Sharing], steps: list[int], heads: NDArray, notes: Ints, per_task: int) -> tuple[Ints, Ints]:
    """Shared tasks, each of `steps` keys, and members; tells `notes` where rows find their states."""
    tasks: list[tuple[int, ...]] = []
    members: list[int] = []
    firsts: list[int] = []
    counts: list[int] = []
    places: list[int] = []
    for sharing, step in zip(groups, steps, strict=True):
        edges = [*range(0, sharing.tokens, step), sharing.tokens]
        for first in range(0, len(sharing.rows), per_task):
            tile = sharing.rows[first : first + per_task]
            table = int(heads[tile[0]])
            firsts += [len(tasks)] * len(tile)
            counts += [len(edges) - 1] * len(tile)
            places += range(len(tile))
            for begin, end in pairwise(edges):
                tasks.append((len(members), len(tile), begin, end, table, 0, 0, 0))
            members += tile
    who = np.array(members, dtype=np.int64)
    notes[who, 2], notes[who, 3], notes[who, 4] = firsts, counts, places
    return np.array(tasks, dtype=np.int32).reshape(-1, SHARED_FIELDS), who.astype(np.int32)


def _shared_steps(groups: list[Sharing], per_task: int, own_keys: int, wanted: int) -> list[int]:
    """Keys of each group's tasks. There are at most `wanted`, or one a tile; half, where the own keys are more work."""
    tiles = [-(-len(sharing.rows) // per_task) for sharing in groups]
    products = sum(count * sharing.tokens for count, sharing in zip(tiles, groups, strict=True))
    wanted, count = wanted if products > own_keys else wanted // 2, sum(tiles)
    splits = [max(1, min(wanted // count, sharing.tokens // SHARED_KEYS)) for sharing in groups]
    return [_rounded(-(-group.tokens // split), TILE) for group, split in zip(groups, splits, strict=True)]


def _split(begins: NDArray, ends: NDArray, heads: NDArray, notes: Ints, wanted: int) -> Ints:
    """Own tasks of about equal length; tells `notes` which ones belong to whom."""
    lengths = ends - begins
    steps = _own_steps(lengths, wanted)
    splits = -(-lengths // steps)
    firsts = splits.cumsum() - splits
    notes[:, 0], notes[:, 1] = firsts, splits
    owners = np.arange(len(notes)).repeat(splits)
    starts = begins[owners] + (np.arange(len(owners)) - firsts[owners]) * steps[owners]
    ends = np.minimum(starts + steps[owners], ends[owners])
    return np.stack([owners, starts, ends, heads[owners]], axis=1).astype(np.int32)


def _own_steps(lengths: NDArray, wanted: int) -> NDArray:
    """Keys of each row's tasks. There are at most `wanted` more tasks than rows."""
    total = int(lengths.sum())
    aim = max(OWN_KEYS, 2 * total / wanted)  # all of them at once, if they are short then
    if aim > 2 * OWN_KEYS:
        aim = max(2 * OWN_KEYS, total / wanted)
    splits = np.maximum(1, np.rint(lengths / aim).astype(np.int64))
    return _rounded(-(-lengths // splits), TILE)


def _tiles(rows: FlatRows, queries: int) -> Ints:
    """Tiles of the chunks' queries."""
    tasks: list[tuple[int, ...]] = []
    token = rows.decodes
    for length, start, head in np.stack([rows.lengths, rows.starts, rows.heads], axis=1)[rows.decodes :].tolist():
        for first in range(0, length, queries):
            tasks.append((token + first, min(queries, length - first), start + first, head))
        token += length
    return np.array(tasks, dtype=np.int32).reshape(-1, CHUNK_FIELDS)


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _rounded(number, to: int):
    return -(-number // to) * to


# -- chunks as decodes ------------------------------------------------------------------------------------------------


def lay_out(rows: list[Row], *, most: int) -> tuple[list[Row], list[int]]:
    """Decodes first; or nothing but decodes, one for each token, where that is faster than to have chunks.

    Args:
        most: how many decodes there may be.

    Returns:
        The rows, and where among them the last token of each given one is.
    """
    chunks = [row for row in rows if len(row.tokens) > 1]
    if not chunks:
        return rows, list(range(len(rows)))
    if _is_better_apart(chunks, most - len(rows) + len(chunks)):
        parts = [_apart(row) for row in rows]
        return list(chain.from_iterable(parts)), [end - 1 for end in accumulate(map(len, parts))]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    return [rows[i] for i in order], inverse(order)


def _is_better_apart(chunks: list[Row], most: int) -> bool:
    """A chunk's tile reads all keys before it one after the other; decodes that share them read them side by side."""
    tokens = sum(len(row.tokens) for row in chunks)
    return tokens <= min(MOST_APART, most) and all(row.start >= LEAST_BEFORE for row in chunks)


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


def _pays(contexts: NDArray, saved: NDArray, groups: list[Sharing], kind: Kind, processors: int, per_task: int) -> bool:
    """Whether reading shared keys once, and merging, is faster than letting each row read them for itself."""
    own_wanted, shared_wanted = tasks_wanted(kind, processors)
    at_once = READ_AT_ONCE * processors / kind.kv_heads * TILE
    merge = MERGE + len(contexts) * kind.heads / MERGED_AT_ONCE

    alone_steps = _own_steps(contexts, own_wanted)
    alone = max(alone_steps.max() / TILE, (contexts - saved + CACHED * saved).sum() / at_once)
    if (alone_steps < contexts).any():
        alone += merge

    tiles = [-(-len(sharing.rows) // per_task) for sharing in groups]
    own = contexts - saved
    longest = max(_shared_steps(groups, per_task, int(own.sum()), shared_wanted))
    products = sum(count * sharing.tokens for count, sharing in zip(tiles, groups, strict=True))
    own_time = max(_own_steps(own, own_wanted).max() / TILE, own.sum() / at_once)
    return max(BESIDE * own_time, longest / TILE, products / at_once) + PARTING + merge < alone


def find_sharing(rows: FlatRows) -> list[Sharing]:
    """Groups of decodes that begin with the same blocks, so that as many reads as possible are saved.

    Tables form a tree. At each fork either all share what they have in common, or each branch shares what it has for
    itself, whatever saves more.

        [3, 4, 9]  [3, 4, 7]  [3, 8]        all: 2 · 1 block        the first two: 1 · 2 blocks
    """
    return _best(_Tables(rows), list(range(rows.decodes)), 0)


def _best(tables: "_Tables", among: list[int], known: int) -> list[Sharing]:
    """The best groups of rows whose first `known` blocks are the same."""
    found: list[Sharing] = []
    for branch in tables.branches(among, known):
        common = tables.common(branch, known + 1)
        whole = Sharing(branch, common * tables.block_size // TILE * TILE)
        parts = _best(tables, branch, common)
        if sum(part.saved for part in parts) > whole.saved:
            found += parts
        elif whole.tokens:
            found.append(whole)
    return found


class _Tables:
    """Block tables as bytes: two of them are compared by one call."""

    def __init__(self, rows: FlatRows) -> None:
        self.block_size = rows.block_size
        self._bytes = rows.tables.tobytes()
        self._blocks = array("i", self._bytes)
        self._heads = rows.heads.tolist()
        self._counts = (rows.starts // rows.block_size).tolist()  # the block of the token itself is always a row's own

    def branches(self, among: list[int], known: int) -> list[list[int]]:
        """Those of the rows that have the block after the first `known` ones in common with others."""
        branches: dict[int, list[int]] = defaultdict(list)
        for row in among:
            if self._counts[row] > known:
                branches[self._blocks[self._heads[row] + known]].append(row)
        return [branch for branch in branches.values() if len(branch) > 1]

    def common(self, branch: list[int], known: int) -> int:
        """How many leading blocks all of these rows have in common, of which so many are known."""
        most = min([self._counts[row] for row in branch]) - known
        first, *others = [self._heads[row] + known for row in branch]
        shared = self._bytes[4 * first : 4 * (first + most)]
        for other in others:
            if not self._bytes.startswith(shared, 4 * other):
                most = common_length(self._blocks[first : first + most], self._blocks[other : other + most])
                shared = shared[: 4 * most]
        return known + most
