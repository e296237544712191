"""The tokens that the launch before drew, where the device finds them: the host may not know them yet."""

from collections.abc import Sequence

import torch
from torch import Tensor

from chatpage.model.batch import Row


class LastTokens:
    """One token a row of the launch before.

    Attributes:
        tokens: (max_rows,), −1 where a row was broken. Their memory stays where it is.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._places: list[int] = []  # in `tokens`, by index in the list that was launched

    def note(self, places: list[int]) -> None:
        """Say where in `tokens` the rows of the list are that was launched."""
        self._places = places

    def sources(self, rows: Sequence[Row]) -> list[int]:
        """Where in `tokens` each row's token lies; −1 where the row has tokens of its own."""
        return [-1 if row.source is None else self._places[row.source] for row in rows]

    def at(self, sources: Tensor) -> Tensor:
        """The tokens there, and any where there is no source, or a broken row, whose next token nobody wants."""
        return self.tokens[sources.clamp(min=0)].clamp(min=0)
