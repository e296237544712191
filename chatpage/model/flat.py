"""The rows of a step as arrays: what all of a step's plans are made of is gathered once."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatpage.model.batch import Row


@dataclass(frozen=True, slots=True)
class FlatRows:
    """Numbers of rows, decodes first.

    Attributes:
        decodes: so many rows have one token.
        lengths, starts, contexts: (rows,), of int64: tokens of the row, before it, and both together.
        heads: (rows,), of int64: where each row's block table begins in `tables`.
        tables: of int32: the null block, then the blocks that each row needs, one table behind the other.
    """

    block_size: int
    decodes: int
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    contexts: NDArray[np.int64]
    heads: NDArray[np.int64]
    tables: NDArray[np.int32]

    @classmethod
    def of(cls, rows: Sequence[Row], block_size: int) -> "FlatRows":
        lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        contexts = starts + lengths
        needed = -(-contexts // block_size)
        tables = array("i", [0])
        for row, count in zip(rows, needed.tolist(), strict=True):
            tables.extend(row.table[:count])
        return cls(
            block_size=block_size,
            decodes=int((lengths == 1).sum()),
            lengths=lengths,
            starts=starts,
            contexts=contexts,
            heads=needed.cumsum() - needed + 1,
            tables=np.frombuffer(tables, dtype=np.int32),
        )
