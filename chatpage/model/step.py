"""One step of the engine: block copies, then the forward, then sampling."""

from typing import TYPE_CHECKING

import torch

from chatpage.model.batch import Batch, Draw, Drawn, Row
from chatpage.model.kv import KVPool
from chatpage.model.reference import ReferenceAttention
from chatpage.model.sampler import sample
from chatpage.schedule.params import SamplingParams

if TYPE_CHECKING:
    from chatpage.model.load import LoadedModel


class ModelRunner:
    """A loaded model and its block pool. It belongs to one thread.

    Attributes:
        loaded: the model.
        pool: its keys and values; `num_blocks` blocks, numbered from 1.
    """

    def __init__(self, loaded: "LoadedModel", *, num_blocks: int, block_size: int) -> None:
        self.loaded = loaded
        self.pool = KVPool(loaded.layers, num_blocks, block_size, loaded.device, loaded.dtype)

    @torch.inference_mode()
    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks, (source, target): what a step asks for before its rows run."""
        self.pool.copy_blocks(pairs)

    @torch.inference_mode()
    def run(self, rows: list[Row]) -> list[Drawn]:
        """Run at least one row, and draw the tokens that they ask for. One entry a row.

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
