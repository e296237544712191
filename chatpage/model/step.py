"""One step of the engine: block copies, then the forward, then sampling.

    host     schedule 2 ─ launch 2 ─ read 1 ─ schedule 3 ─ launch 3 ─ read 2
    device   … step 1 ─────────────┤ step 2 ───────────────────────┤ step 3 …

A row of step 2 may need a token that step 1 draws, which the host does not know when it launches it: `Row.source`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from chatpage.errors import ModelError
from chatpage.model.attention import Attention
from chatpage.model.batch import Batch, Draw, Drawn, Row
from chatpage.model.check import attends_alike
from chatpage.model.kv import KVPool
from chatpage.model.last import LastTokens
from chatpage.model.reference import ReferenceAttention
from chatpage.model.sampler import InOrder, begin_sampling
from chatpage.schedule.params import SamplingParams

if TYPE_CHECKING:
    from chatpage.model.graph import Graphs
    from chatpage.model.load import LoadedModel


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
        self._copy = self.pool.copy_blocks
        self._last = LastTokens(max_rows, loaded.device)
        self._graphs: Graphs | None = None

    def use_kernels(self) -> None:
        """Attend by Triton's kernels from now on.

        Raises:
            Exception: of any kind, where Triton, or this GPU, does not do what it should.
        """
        from chatpage.kernels.copy import BlockCopier  # what imports Triton is imported where there is a GPU only
        from chatpage.model.fused_kernels import KernelModel
        from chatpage.model.paged import PagedAttention

        loaded = self.loaded
        forwards = [KernelModel(loaded.fused).forward, loaded.forward] if loaded.fused else [loaded.forward]
        for forward in forwards:
            if attends_alike(loaded.module, forward, loaded.layers, PagedAttention):
                self._forward, self._attention = forward, PagedAttention
                self._copy = BlockCopier(self.pool.tensors).copy
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
        from chatpage.model.graph import Graphs
        from chatpage.model.paged import kinds_of

        self._graphs = Graphs(
            self._forward,
            self.pool,
            self._last,
            kinds_of(self._forward, self.pool),
            vocabulary=self.loaded.vocab_size,
            max_rows=len(self._last.tokens),
            max_tokens=max_tokens,
            max_blocks=max_blocks,
            say=say,
        )

    @torch.inference_mode()
    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks, (source, target): what a step asks for before its rows run."""
        self._copy(pairs)

    def launch(self, rows: list[Row]) -> Launched:
        """Begin to run at least one row, after all that was launched or copied before."""
        if self._graphs and self._graphs.fits(rows):
            return self._graphs.launch(rows)
        return self._launch(rows)

    @torch.inference_mode()
    def _launch(self, rows: list[Row]) -> InOrder:
        batch = Batch.build(rows, block_size=self.pool.block_size, device=self.loaded.device)
        if any(row.source is not None for row in rows):
            batch = self._with_last_tokens(batch)
        logits = self._forward(batch, self._attention(self.pool, batch))
        sampled = begin_sampling(logits, batch.draws)
        self._last.tokens[: len(rows)] = sampled.tokens
        self._last.note(batch.order)
        return InOrder(sampled, batch.order)

    def _with_last_tokens(self, batch: Batch) -> Batch:
        places = torch.tensor(self._last.sources(batch.rows), device=self.loaded.device)
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
