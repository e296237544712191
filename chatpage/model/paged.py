"""Paged attention by Triton kernels.

plan ──▶ shared prefixes ─┐  side by side, on two streams
         own keys ────────┴▶ merge ──▶ answers of the decodes
         chunks ─────────────────────▶ answers of the chunks
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from chatpage.device import to_device
from chatpage.kernels.decode import attend_decodes, is_crowd
from chatpage.kernels.merge import FEW, merge
from chatpage.kernels.prefill import attend_chunks, queries_per_task
from chatpage.kernels.rotate import Turn, turn_and_store
from chatpage.kernels.shared import attend_shared
from chatpage.kernels.softmax import Left
from chatpage.kernels.store import store
from chatpage.model.attention import AttentionCall
from chatpage.model.batch import Batch, Row
from chatpage.model.check import Forward
from chatpage.model.flat import FlatRows
from chatpage.model.kv import KVPool
from chatpage.model.plan import Kind, Plan, find_sharing, make_plan

CPU_PROCESSORS = 8  # under Triton's interpreter


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A plan where the kernels read it; see `chatpage.model.plan.Plan`.

    Attributes:
        tables: the rows' block tables, one behind the other.
        many: whether to expect rows whose answers are merged from many states.
    """

    tables: Tensor
    own: Tensor
    rows: Tensor
    shared: Tensor
    members: Tensor
    chunks: Tensor
    shared_rows: int
    merges: bool
    many: bool

    @classmethod
    def of(cls, plan: Plan, tables: Tensor) -> "DevicePlan":
        def there(numbers: np.ndarray) -> Tensor:
            return to_device(numbers, tables.device, torch.int32)

        return cls(
            tables=tables,
            own=there(plan.own),
            rows=there(plan.rows),
            shared=there(plan.shared),
            members=there(plan.members),
            chunks=there(plan.chunks),
            shared_rows=plan.shared_rows,
            merges=plan.most_states > 1,
            many=plan.most_states > 2 * FEW,
        )


class KernelAttention:
    """Attends by the kernels, as somebody else has planned it.

    Args:
        slots: (tokens,), where each token's keys and values go; −1 is nowhere.
        plan_for: what layers of a kind do.
    """

    def __init__(self, pool: KVPool, slots: Tensor, plan_for: Callable[[Kind], DevicePlan]) -> None:
        self.pool = pool
        self._slots = slots
        self._plan_for = plan_for

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        self.store(layer, key, value)
        return self.read(layer, query, call)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put the step's keys and values into the pool."""
        keys, values = self.pool.flat(self.pool.keys[layer]), self.pool.flat(self.pool.values[layer])
        store(_dense(key), _dense(value), keys, values, self._slots)

    def turn_and_store(self, layer: int, heads: Tensor, turn: Turn) -> Tensor:
        """Queries, turned, of heads of queries, keys and values; keys, turned too, and values go into the pool."""
        return turn_and_store(heads, turn, self.pool.keys[layer], self.pool.values[layer], self._slots)

    def read(self, layer: int, query: Tensor, call: AttentionCall) -> Tensor:
        """Answer the queries, whose keys and values are in the pool."""
        query = _dense(query)
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        plan = self._plan_for(Kind(query.shape[1], keys.shape[2], call.window))
        out = query.new_empty(*query.shape[:2], values.shape[3])
        if len(plan.own):
            self._decode(plan, query, keys, values, out, call)
        if len(plan.chunks):
            attend_chunks(
                query,
                keys,
                values,
                plan.tables,
                plan.chunks,
                out,
                window=call.window,
                scaling=call.scaling,
                softcap=call.softcap,
                sinks=call.sinks,
            )
        return out

    @staticmethod
    def _decode(
        plan: DevicePlan,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        call: AttentionCall,
    ) -> None:
        heads, kv_heads, value_size = query.shape[1], keys.shape[2], values.shape[3]
        own = _left(query, len(plan.own) * heads, value_size)
        shared = _left(query, len(plan.shared) * kv_heads * plan.shared_rows, value_size)
        beside = len(plan.shared) > 0
        shared_first = beside and is_crowd(len(plan.rows), kv_heads)

        def attend_to_shared() -> None:
            attend_shared(
                query,
                keys,
                values,
                plan.tables,
                plan.shared,
                plan.members,
                shared,
                shared_rows=plan.shared_rows,
                early=shared_first,
                scaling=call.scaling,
                softcap=call.softcap,
            )

        def attend_to_own() -> None:
            attend_decodes(
                query,
                keys,
                values,
                plan.tables,
                plan.own,
                plan.rows,
                own,
                out,
                beside=beside,
                early=not shared_first,
                scaling=call.scaling,
                softcap=call.softcap,
                sinks=call.sinks,
            )

        if not beside:
            attend_to_own()
        elif shared_first:
            _side_by_side(query.device, attend_to_shared, attend_to_own)
        else:
            _side_by_side(query.device, attend_to_own, attend_to_shared)
        if plan.merges:
            merge(
                plan.rows,
                own,
                shared,
                out,
                kv_heads=kv_heads,
                shared_rows=plan.shared_rows,
                many=plan.many,
                sinks=call.sinks,
            )


class PagedAttention(KernelAttention):
    """Attends for one step.

    Args:
        shared: True reads shared prefixes once wherever there are any, False never; None does what is faster.

    Attributes:
        plans: for the kinds of layers that have asked so far.
    """

    def __init__(self, pool: KVPool, batch: Batch, *, shared: bool | None = None) -> None:
        rows = FlatRows.of(batch.rows, batch.block_size)
        groups = [] if shared is False else find_sharing(rows)
        tables = to_device(rows.tables, batch.slots.device, torch.int32)

        self.plans: dict[Kind, DevicePlan] = {}

        def plan_for(kind: Kind) -> DevicePlan:
            if kind not in self.plans:
                plan = make_plan(
                    rows,
                    groups,
                    kind,
                    room=max(1, rows.decodes),
                    processors=processors(tables.device),
                    queries=queries_per_task(kind.heads, kind.kv_heads),
                    always=shared is True,
                )
                self.plans[kind] = DevicePlan.of(plan, tables)
            return self.plans[kind]

        super().__init__(pool, batch.slots, plan_for)


@torch.inference_mode()
def kinds_of(compute: Forward, pool: KVPool) -> list[Kind]:
    """The kinds of a model's layers: those that attend to a token that nobody asked for."""
    batch = Batch.build([Row([0], 0, [0], store=False)], block_size=pool.block_size, device=pool.keys[0].device)
    attention = PagedAttention(pool, batch)
    compute(batch, attention)
    return list(attention.plans)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return CPU_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense(heads: Tensor) -> Tensor:
    """The same (tokens, heads, size), without gaps between the numbers of a head."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _left(like: Tensor, rows: int, value_size: int) -> Left:
    return Left(like.new_empty(rows, value_size), like.new_empty(rows, dtype=torch.float32))


def _side_by_side(device: torch.device, first: Callable[[], None], second: Callable[[], None]) -> None:
    """Launch both so that they run at the same time; what follows waits for both.

    The first has room first. It stays on the stream of the kernel before it, so it can begin early.
    """
    if device.type != "cuda":
        first()
        second()
        return
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    try:
        first()
        with torch.cuda.stream(side):
            second()
    finally:  # what both use is given back to the main one, whatever happens
        main.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
