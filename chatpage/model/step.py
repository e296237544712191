"""One step of the engine: block copies, then the forward, then sampling.

    host     schedule 2 ─ launch 2 ─ read 1 ─ schedule 3 ─ launch 3 ─ read 2
    device   … step 1 ─────────────┤ step 2 ───────────────────────┤ step 3 …

A row of step 2 may need a token that step 1 draws, which the host does not know when it launches it: `Row.source`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from chatpage.device import to_device
from chatpage.errors import ModelError
from chatpage.model.attention import Attention
from chatpage.model.batch import Batch, Draw, Drawn, Row, inverse
from chatpage.model.check import attends_alike, draws_alike
from chatpage.model.kv import KVPool, free_memory
from chatpage.model.last import LastTokens
from chatpage.model.reference import ReferenceAttention
from chatpage.model.sampler import InOrder, begin_sampling
from chatpage.schedule.params import SamplingParams

if TYPE_CHECKING:
    from chatpage.model.frame import Size
    from chatpage.model.graph import Graphs
    from chatpage.model.load import LoadedModel


Copy = Callable[[list[tuple[int, int]]], None]

CONTEXTS = (64, 512, 2048, 8192)  # tokens: some are shared and some are not, some are split and some are not

# A wish that takes more memory than any other.
DEAREST = SamplingParams(
    top_k=50, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.1, logit_bias=((0, 1.0),), logprobs=20
)


class Launched(Protocol):
    """Rows that were handed to the device."""

    def drawn(self) -> list[Drawn]:
        """What each row gave, in the order of the rows; waits for the device."""
        ...


class ModelRunner:
    """A loaded model and its block pool. It belongs to one thread.

    Args:
        max_rows: of a step.

    Attributes:
        loaded: the model.
        pool: its keys and values; `num_blocks` blocks, numbered from 1.
        overlaps: whether the host has something to do while the device runs. A CPU computes when it is asked to, so
            it is not worth while there to have a step in flight.
    """

    def __init__(self, loaded: "LoadedModel", *, num_blocks: int, block_size: int, max_rows: int) -> None:
        self.loaded = loaded
        self.pool = KVPool(loaded.layers, num_blocks, block_size, loaded.device, loaded.dtype)
        self.overlaps = loaded.device.type == "cuda"
        self._forward = loaded.forward
        self._attention: Callable[[KVPool, Batch], Attention] = ReferenceAttention
        self._copier: Callable[[KVPool], Copy] = lambda pool: pool.copy_blocks
        self._copy = self._copier(self.pool)
        self._last = LastTokens(max_rows, loaded.device)
        self._graphs: Graphs | None = None

    def use_kernels(self) -> None:
        """Attend by Triton's kernels from now on.

        Raises:
            Exception: of any kind, where Triton, or this GPU, does not do what it should.
        """
        from chatpage.kernels.copy import BlockCopier  # what imports Triton is imported where there is a GPU only
        from chatpage.kernels.draw import draw
        from chatpage.model.fused_kernels import KernelModel
        from chatpage.model.paged import PagedAttention

        loaded = self.loaded
        if not draws_alike(draw, loaded.device, loaded.dtype, loaded.vocab_size):
            raise ModelError("the kernels draw other tokens than plain PyTorch")
        forwards = [KernelModel(loaded.fused).forward, loaded.forward] if loaded.fused else [loaded.forward]
        for forward in forwards:
            if attends_alike(loaded.module, forward, loaded.layers, PagedAttention):
                self._forward, self._attention = forward, PagedAttention
                self._copier = lambda pool: BlockCopier(pool.tensors).copy
                self._copy = self._copier(self.pool)
                self._copy([(0, 1)])  # compiles it, before somebody waits for that
                return
        raise ModelError("the kernels give other logits than plain PyTorch")

    def record_steps(self, *, max_tokens: int, max_blocks: int, say: Callable[[str], None]) -> None:
        """Record whole steps as graphs, to be replayed from now on. The kernels must be in use.

        Args:
            max_tokens: of a step.
            max_blocks: of a row.
            say: is told, in a few words, how far it is.

        Raises:
            RuntimeError: the model does something that cannot be recorded.
        """
        from chatpage.model.frame import sizes

        self._graphs = self._record(sizes(len(self._last.tokens), max_tokens), max_blocks, say)

    def compile_steps(self, *, max_context: int) -> None:
        """Run decodes of many numbers and lengths once: nothing is compiled later, while somebody waits.

        Where steps are recorded, that has compiled all there is.
        """
        from chatpage.model.frame import DECODES

        rows = len(self._last.tokens)
        contexts = [*(length for length in CONTEXTS if length < max_context), max_context]
        for count in [*(count for count in DECODES if count < rows), rows]:
            for context in contexts:
                table = [0] * -(-context // self.pool.block_size)
                self.run([Row([0], context - 1, table, store=False)] * count)

    def _record(self, wanted: "list[Size]", max_blocks: int, say: Callable[[str], None]) -> "Graphs":
        from chatpage.model.graph import Graphs
        from chatpage.model.paged import kinds_of

        return Graphs(
            self._forward,
            self.pool,
            self._last,
            kinds_of(self._forward, self.pool),
            wanted,
            vocabulary=self.loaded.vocab_size,
            max_rows=len(self._last.tokens),
            max_blocks=max_blocks,
            say=say,
        )

    # -- memory ---------------------------------------------------------------------------------------------------

    def resize(self, num_blocks: int) -> None:
        """Have another pool, whose blocks are empty. What was recorded over the old one is forgotten.

        Raises:
            RuntimeError, MemoryError: it does not fit into memory; there is none then.
        """
        old, self._graphs = self.pool, None
        layers, block_size, device, dtype = self.loaded.layers, old.block_size, self.loaded.device, self.loaded.dtype
        del old, self.pool, self._copy  # the memory is needed for the new one
        self.pool = KVPool(layers, num_blocks, block_size, device, dtype)
        self._copy = self._copier(self.pool)

    def measure_step(self, *, max_tokens: int, max_context: int, recorded: bool) -> int:
        """Bytes that the largest step takes besides the pool: it runs once. On a CPU nothing runs, and nothing counts.

        Args:
            max_tokens: of a step.
            max_context: of a row.
            recorded: as a graph. The kernels must be in use.

        Raises:
            torch.OutOfMemoryError: there is not so much.
            RuntimeError: the model does something that cannot be recorded.
        """
        device, rows = self.loaded.device, len(self._last.tokens)
        if device.type != "cuda":
            return 0
        try:
            if recorded:
                from chatpage.model.frame import largest

                max_context = min(max_context, max_tokens)  # the kernels take no more memory for longer ones
                max_blocks = -(-max_context // self.pool.block_size)
                self._graphs = self._record(largest(rows, max_tokens), max_blocks, lambda detail: None)
            self.run(largest_step(rows, max_tokens, max_context, self.pool.block_size))
            left = torch.cuda.mem_get_info(device)[0]
        finally:
            self._graphs = None
        return max(0, free_memory(device) - left)

    @torch.inference_mode()
    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks, (source, target): what a step asks for before its rows run."""
        self._copy(pairs)

    def launch(self, rows: list[Row]) -> Launched:
        """Begin to run at least one row, after all that was launched or copied before."""
        launched = self._graphs.launch(rows) if self._graphs else None
        return launched or self._launch(rows)

    @torch.inference_mode()
    def _launch(self, rows: list[Row]) -> InOrder:
        batch = Batch.build(rows, block_size=self.pool.block_size, device=self.loaded.device)
        if any(row.source is not None for row in rows):
            batch = self._with_last_tokens(batch)
        logits = self._forward(batch, self._attention(self.pool, batch))
        sampled = begin_sampling(logits, batch.draws)
        self._last.tokens[: len(rows)] = sampled.tokens
        places = inverse(batch.order)
        self._last.note(places)
        return InOrder(sampled, places)

    def _with_last_tokens(self, batch: Batch) -> Batch:
        places = to_device(self._last.sources(batch.rows), self.loaded.device)
        sources = torch.full_like(batch.token_ids, -1)
        sources[batch.query_starts[:-1]] = places
        return replace(batch, token_ids=self._last.at(sources).where(sources >= 0, batch.token_ids))

    def run(self, rows: list[Row]) -> list[Drawn]:
        """Run at least one row whose tokens are known, and draw what they ask for. One entry a row.

        The same rows may run again: they write the same into the same slots.
        """
        return self.launch(rows).drawn()

    def require_sound(self) -> None:
        """Compute one token that nobody asked for, in the null block.

        Raises:
            RuntimeError: that fails too, so it is no use to go on.
        """
        draw = Draw(SamplingParams(temperature=0), seed=0, choice=0, position=1)
        try:
            [drawn] = self.run([Row([0], 0, [0], store=False, sample=draw)])
        except Exception as error:
            raise RuntimeError("The model computes nothing any more.") from error
        if drawn.error:
            raise RuntimeError("The model computes nothing any more.")


def largest_step(max_rows: int, max_tokens: int, max_context: int, block_size: int) -> list[Row]:
    """A step of as many rows and tokens as there may be, as far as contexts are long enough.

    It reads the null block, and keeps nothing.
    """
    rows = min(max_rows, max_tokens)
    lengths, spare = [1] * rows, max_tokens - rows
    for i in range(rows):
        lengths[i] += min(spare, max_context - 1)
        spare -= lengths[i] - 1
    table = [0] * -(-max_context // block_size)
    draw = Draw(DEAREST, seed=0, choice=0, position=max_context, tokens=[0, 0], prompt_length=1)
    starts = [max_context - length if length > 1 else 0 for length in lengths]
    return [
        Row([0] * length, start, table, store=False, sample=draw) for length, start in zip(lengths, starts, strict=True)
    ]
