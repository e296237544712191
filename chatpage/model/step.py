"""One step of the engine: block copies, then the forward, then sampling.

    host     schedule 2 ─ launch 2 ─ read 1 ─ schedule 3 ─ launch 3 ─ read 2
    device   … step 1 ─────────────┤ step 2 ───────────────────────┤ step 3 …

A row of step 2 may need a token that step 1 draws, which the host does not know when it launches it: `Row.source`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from chatpage.model.batch import Batch, Draw, Drawn, Row
from chatpage.model.kv import KVPool
from chatpage.model.reference import ReferenceAttention
from chatpage.model.sampler import sample
from chatpage.schedule.params import SamplingParams

if TYPE_CHECKING:
    from chatpage.model.load import LoadedModel


class Launched(Protocol):
    """Rows that were handed to the device."""

    def drawn(self) -> list[Drawn]:
        """What each row gave, in the order of the rows; waits for the device."""
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """Rows whose results are there already."""

    results: list[Drawn]

    def drawn(self) -> list[Drawn]:
        return self.results


class ModelRunner:
    """A loaded model and its block pool. It belongs to one thread.

    Attributes:
        loaded: the model.
        pool: its keys and values; `num_blocks` blocks, numbered from 1.
        overlaps: whether the host has something to do while the device runs. A CPU computes when it is asked to, so
            it is not worth while there to have a step in flight.
    """

    overlaps = False

    def __init__(self, loaded: "LoadedModel", *, num_blocks: int, block_size: int) -> None:
        self.loaded = loaded
        self.pool = KVPool(loaded.layers, num_blocks, block_size, loaded.device, loaded.dtype)
        self._before: list[Drawn] = []  # what the launch before gave

    @torch.inference_mode()
    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks, (source, target): what a step asks for before its rows run."""
        self.pool.copy_blocks(pairs)

    def launch(self, rows: list[Row]) -> Launched:
        """Begin to run at least one row, after all that was launched or copied before."""
        drawn = self.run([self._with_token(row) for row in rows])
        self._before = drawn
        return Computed(drawn)

    def _with_token(self, row: Row) -> Row:
        if row.source is None:
            return row
        # A row that is broken drew nothing; what follows it is dropped, so any token will do.
        return replace(row, tokens=[self._before[row.source].token or 0], source=None)

    @torch.inference_mode()
    def run(self, rows: list[Row]) -> list[Drawn]:
        """Run at least one row whose tokens are known, and draw what they ask for. One entry a row.

        The same rows may run again: they write the same into the same slots.
        """
        batch = Batch.build(rows, block_size=self.pool.block_size, device=self.loaded.device)
        logits = self.loaded.forward(batch, ReferenceAttention(self.pool, batch))
        return batch.in_order(sample(logits, batch.draws))

    def require_sound(self) -> None:
        """Compute one token that nobody asked for, in the null block.

        Raises:
            RuntimeError: that fails too, so it is no use to go on.
        """
        draw = Draw(SamplingParams(temperature=0), seed=0, choice=0, position=1)
        try:
            [drawn] = self.run([Row([0], 0, [0], sample=draw)])
        except Exception as error:
            raise RuntimeError("The model computes nothing any more.") from error
        if drawn.error:
            raise RuntimeError("The model computes nothing any more.")
