"""Whole steps as CUDA graphs: recorded once for some sizes, replayed for every step that fits one of them.

    rows ─▶ frame ─▶ one upload ─▶ replay: token ids ─ layers ─ logits ─ draws ─▶ draws that change logits ─▶ tokens

A graph knows addresses, not numbers: how long rows are, where their blocks lie and what each program does it reads from
device memory each time. So a step needs no more than the smallest graph that has room for it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chatpage.kernels.draw import draw
from chatpage.kernels.inputs import widen
from chatpage.kernels.merge import FEW
from chatpage.kernels.prefill import queries_per_task
from chatpage.model.batch import Row
from chatpage.model.check import Forward
from chatpage.model.flat import FlatRows
from chatpage.model.frame import Form, Frame, Size
from chatpage.model.kv import KVPool
from chatpage.model.last import LastTokens
from chatpage.model.paged import DevicePlan, KernelAttention, processors
from chatpage.model.plan import Kind, Plan, find_sharing, lay_out, make_plan, tasks_wanted
from chatpage.model.sampler import InOrder, begin_sampling

IN_FLIGHT = 2  # frames that may be on their way to the device


@dataclass(frozen=True, slots=True)
class RecordedInputs:
    """See `chatpage.model.batch.Inputs`."""

    token_ids: Tensor
    positions: Tensor
    sampled: Tensor
    logits: Tensor


class Buffer:
    """Memory of the host from which a frame is uploaded while the host goes on."""

    def __init__(self, length: int) -> None:
        self._tensor = torch.zeros(length, dtype=torch.int32, pin_memory=True)
        self._uploaded = torch.cuda.Event()
        self.numbers = self._tensor.numpy()

    def wait(self) -> None:
        """Until the last upload is over."""
        self._uploaded.synchronize()

    def upload(self, target: Tensor, length: int) -> None:
        target[:length].copy_(self._tensor[:length], non_blocking=True)
        self._uploaded.record()


class Graphs:
    """The graphs of a model over its pool.

    Args:
        kinds: of the model's layers.
        wanted: sizes to record.
        max_rows: of a step.
        max_blocks: of a row.
        say: is told, in a few words, how far it is.

    Raises:
        RuntimeError: the model does something that cannot be recorded.
    """

    def __init__(
        self,
        forward: Forward,
        pool: KVPool,
        last: LastTokens,
        kinds: list[Kind],
        wanted: list[Size],
        *,
        vocabulary: int,
        max_rows: int,
        max_blocks: int,
        say: Callable[[str], None],
    ) -> None:
        self.pool = pool
        self._last = last
        self._forward = forward
        self._kinds = kinds
        device, dtype = pool.keys[0].device, pool.keys[0].dtype
        self._processors = processors(device)
        self._frames = {size: Frame(size, kinds, self._processors) for size in wanted}
        length = max(frame.tables for frame in self._frames.values()) + max_rows * max_blocks + 1
        self._numbers = torch.zeros(length, dtype=torch.int32, device=device)
        self._buffers = [Buffer(length) for _ in range(IN_FLIGHT)]
        self._logits = torch.zeros(max_rows, vocabulary, dtype=dtype, device=device)
        self._graphs = self._record(say)

    # -- recording ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _record(self, say: Callable[[str], None]) -> dict[Size, torch.cuda.CUDAGraph]:
        """All of them in the same memory, the largest first."""
        graphs = {}
        memory = torch.cuda.graph_pool_handle()
        for size in sorted(self._frames, key=lambda size: size.tokens, reverse=True):
            say(f"Recording steps: {len(graphs)} of {len(self._frames)}")
            frame = self._frames[size]
            self._upload(size, [], FlatRows.of([], self.pool.block_size), {kind: Plan.empty() for kind in self._kinds})
            self._run(frame)  # compiles what is not compiled yet
            torch.cuda.synchronize()
            graphs[size] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[size], pool=memory):
                self._run(frame)
        return graphs

    def _run(self, frame: Frame) -> None:
        numbers, rows = self._numbers, frame.size.rows
        token_ids, positions, sampled = widen(
            frame.token_ids.of(numbers),
            frame.sources.of(numbers),
            frame.positions.of(numbers),
            frame.sampled.of(numbers),
            self._last.tokens,
        )
        inputs = RecordedInputs(token_ids, positions, sampled, self._logits[:rows])
        plans = {kind: self._device_plan(frame, kind) for kind in self._kinds}
        attention = KernelAttention(self.pool, frame.slots.of(numbers), plans.__getitem__)
        logits = self._forward(inputs, attention)
        if logits is not inputs.logits:
            inputs.logits.copy_(logits)
        wishes, points = frame.wishes.of(numbers).view(torch.float32), frame.points.of(numbers).view(torch.float64)
        draw(logits, wishes, points[:, 0], self._last.tokens[:rows])

    def _device_plan(self, frame: Frame, kind: Kind) -> DevicePlan:
        numbers, places = self._numbers, frame.plans[kind]
        return DevicePlan(
            tables=numbers[frame.tables :],
            own=places.own.of(numbers),
            rows=places.rows.of(numbers),
            shared=places.shared.of(numbers),
            members=places.members.of(numbers),
            chunks=places.chunks.of(numbers),
            shared_rows=places.shared_rows,
            merges=frame.size.form is not Form.ALONE,
            many=max(tasks_wanted(kind, self._processors)) > 2 * FEW * frame.size.decodes,
        )

    # -- replaying ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, rows: list[Row]) -> InOrder | None:
        """Begin to compute these rows, if there is a graph with room for them."""
        laid_out, places = lay_out(rows, most=len(self._logits))
        flat = FlatRows.of(laid_out, self.pool.block_size)
        size = self._smallest(len(laid_out), int(flat.lengths.sum()))
        if size is None:
            return None
        size = self._fill_and_upload(size, laid_out, flat)
        self._graphs[size].replay()
        draws, count = [row.sample for row in laid_out], len(laid_out)
        sampled = begin_sampling(self._logits[:count], draws, self._last.tokens[:count])
        self._last.note(places)
        return InOrder(sampled, places)

    def _smallest(self, rows: int, tokens: int) -> Size | None:
        """The smallest size, of any form, with room for so many rows of so many tokens together."""
        form = Form.MIXED if tokens > rows else Form.SPLIT
        fitting = (s for s in self._frames if s.form is form and s.rows >= rows and s.tokens >= tokens)
        return next(fitting, None)

    def _fill_and_upload(self, size: Size, rows: list[Row], flat: FlatRows) -> Size:
        """Bring the numbers of a step, decodes first, to where a graph reads them; says which form of that size."""
        groups = find_sharing(flat)
        plans = {
            kind: make_plan(
                flat,
                groups,
                kind,
                room=size.decodes,
                processors=self._processors,
                queries=queries_per_task(kind.heads, kind.kv_heads),
            )
            for kind in self._kinds
        }
        if size.form is not Form.MIXED:
            size = replace(size, form=_form(plans.values()))
        self._upload(size, rows, flat, plans)
        return size

    def _upload(self, size: Size, rows: list[Row], flat: FlatRows, plans: Mapping[Kind, Plan]) -> None:
        buffer = self._buffers[0]
        self._buffers.append(self._buffers.pop(0))
        buffer.wait()
        length = self._frames[size].fill(buffer.numbers, rows, flat, self._last.sources(rows), plans)
        buffer.upload(self._numbers, length)


def _form(plans: Iterable[Plan]) -> Form:
    """The form of decodes that does all that these plans need."""
    if any(len(plan.shared) for plan in plans):
        return Form.SHARED
    return Form.SPLIT if any(plan.most_states > 1 for plan in plans) else Form.ALONE
