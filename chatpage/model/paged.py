"""Paged attention by Triton kernels, for one step."""

from functools import cache

import torch
from torch import Tensor

from chatpage.kernels.decode import attend_decodes
from chatpage.kernels.prefill import attend_chunks, queries_per_task
from chatpage.kernels.shared import attend_shared
from chatpage.kernels.softmax import Left
from chatpage.kernels.store import store
from chatpage.model.batch import Batch
from chatpage.model.kv import KVPool
from chatpage.model.plan import find_sharing, make_plan

PROGRAMS_PER_PROCESSOR = 4  # that keep a GPU's multiprocessor busy


class PagedAttention:
    def __init__(self, pool: KVPool, batch: Batch, *, shared: bool | None = None) -> None:
        self.pool = pool
        self.batch = batch
        self._device = batch.token_ids.device
        self._tables = batch.tables.to(torch.int32)
        self._groups = [] if shared is False else find_sharing(batch)
        self._plans: dict[tuple[int, int, int | None], tuple] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling, window, softcap, sinks
    ) -> Tensor:
        self.store(layer, key, value)
        return self.read(layer, query, scaling=scaling, window=window, softcap=softcap, sinks=sinks)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        keys, values = self.pool.flat(self.pool.keys[layer]), self.pool.flat(self.pool.values[layer])
        store(key, value, keys, values, self.batch.slots)

    def read(self, layer: int, query: Tensor, *, scaling, window, softcap, sinks) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        heads, kv_heads, value_size = query.shape[1], keys.shape[2], values.shape[3]
        own, rows, shared_tasks, members, chunks, shared_rows = self._plan(heads, kv_heads, window)
        out = query.new_empty(len(query), heads, value_size)
        asked = {"scaling": scaling, "softcap": softcap}
        if len(own):
            shared = _left(len(shared_tasks) * kv_heads * shared_rows, value_size, self._device)
            if len(shared_tasks):
                attend_shared(
                    query, keys, values, self._tables, shared_tasks, members, shared, shared_rows=shared_rows, **asked
                )
            left = _left(len(own) * heads, value_size, self._device)
            arrived = torch.zeros(len(rows), kv_heads, dtype=torch.int32, device=self._device)
            attend_decodes(
                query,
                keys,
                values,
                self._tables,
                own,
                rows,
                left,
                arrived,
                shared,
                out,
                shared_rows=shared_rows,
                sinks=sinks,
                **asked,
            )
        if len(chunks):
            attend_chunks(query, keys, values, self._tables, chunks, out, window=window, sinks=sinks, **asked)
        return out

    def _plan(self, heads: int, kv_heads: int, window: int | None):
        key = (heads, kv_heads, window)
        if key not in self._plans:
            plan = make_plan(
                self.batch,
                self._groups if window is None else [],
                heads=heads,
                kv_heads=kv_heads,
                window=window,
                programs=_processors(self._device) * PROGRAMS_PER_PROCESSOR,
                queries=queries_per_task(heads, kv_heads),
            )
            self._plans[key] = tuple(
                torch.from_numpy(t).to(self._device)
                for t in (plan.own, plan.rows, plan.shared, plan.members, plan.chunks)
            ) + (plan.shared_rows,)
        return self._plans[key]


def _left(rows: int, value_size: int, device: torch.device) -> Left:
    return Left(
        torch.empty(rows, value_size, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
