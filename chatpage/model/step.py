"""One step of the engine: copies, then the forward, then sampling."""

from typing import TYPE_CHECKING

import torch

from chatpage.model.attention import forward
from chatpage.model.batch import Batch, Row
from chatpage.model.kv import KVPool
from chatpage.model.reference import ReferenceAttention
from chatpage.model.sampler import sample

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
    def run(self, rows: list[Row], copies: list[tuple[int, int]] | None = None) -> list[int | None]:
        """Copy blocks, (source, target), run the rows, and draw the tokens that they ask for.

        Returns:
            One entry a row: the drawn token; None where the row asks for none, or where its logits are not finite.
        """
        self.pool.copy_blocks(copies or [])
        if not rows:
            return []
        batch = Batch.build(rows, block_size=self.pool.block_size, device=self.loaded.device)
        logits = forward(self.loaded.module, batch, ReferenceAttention(self.pool, batch))
        return batch.in_order(sample(logits, batch.draws))
