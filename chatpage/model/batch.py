"""What enters the model in one step: the rows of the scheduler, flattened into tensors.

rows (two sequences)     tokens [9]          start 5   table [3, 8]      a decode
                         tokens [1, 2, 3]    start 0   table [4]         a chunk of a prompt
token_ids                9 | 1 2 3
positions                5 | 0 1 2
slots (block size 4)    33 | 16 17 18
query_starts             0   1       4
contexts                 6 | 3
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from chatpage.device import to_device
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Logprob


@dataclass(slots=True)
class Draw:
    """A wish for the token at `position`. The same logits, params, seed, choice and position give the same token.

    Attributes:
        tokens: the sequence so far, at which penalties look: `prompt_length` tokens of the prompt, then what was drawn.
        banned: tokens that may not be drawn yet.
        candidates: so many of the likeliest tokens are wanted, and none is drawn.
    """

    params: SamplingParams
    seed: int
    choice: int
    position: int
    tokens: Sequence[int] = ()
    prompt_length: int = 0
    banned: Collection[int] = ()
    candidates: int = 0


class Drawn(NamedTuple):
    """What a row gave.

    Attributes:
        token: the one that was drawn; None where none was asked for, or the row is broken.
        logprob: of that token, where it was asked for.
        error: one sentence, where the row is broken.
        candidates: the likeliest tokens with their scores, the likeliest first, where they were asked for.
    """

    token: int | None = None
    logprob: Logprob | None = None
    error: str | None = None
    candidates: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Row:
    """One sequence's part of a step.

    Attributes:
        tokens: ids that enter the model, at positions start, start + 1, …
        start: how many tokens of the sequence went before; their keys and values are in the pool.
        table: physical blocks of positions 0 to start + len(tokens) − 1; it may be longer.
        store: False where the pool has the keys and values of `tokens` too, and they run again for their logits only.
        sample: asks for the token after the last of `tokens`; None where more of the prompt is to come.
        source: where the row's single token is still on the device: the row of the launch before that draws it.
            `tokens` holds a 0 in its place then.
    """

    tokens: list[int]
    start: int
    table: Sequence[int]
    store: bool = True
    sample: Draw | None = None
    source: int | None = None

    @property
    def context(self) -> int:
        """Tokens that the last of the row's tokens can see, itself included."""
        return self.start + len(self.tokens)

    def slots(self, block_size: int) -> list[int]:
        """Where each token's keys and values go; −1 is nowhere."""
        if not self.store:
            return [-1] * len(self.tokens)
        positions = range(self.start, self.context)
        return [self.table[p // block_size] * block_size + p % block_size for p in positions]


class Inputs(Protocol):
    """What of a step enters the model itself: see `Batch`."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def sampled(self) -> Tensor: ...
    @property
    def logits(self) -> Tensor | None:
        """Where the logits are wanted, if not in memory of their own; a model may leave them elsewhere all the same."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, ordered by query length (decodes first), origin and context. All integers are int64.

    Attributes:
        rows: the rows in this order.
        order: index of each of them in the caller's list.
        origins: the block that a row begins with, where others begin with it too; else 0.
        block_size: slots in a block.
        token_ids, positions, slots: (tokens,), row after row.
        query_starts: (rows + 1,), where each row's tokens begin.
        contexts: (rows,), tokens that each row can see, its own included.
        tables: (rows, blocks), the block tables, filled up with the null block.
        sampled: (rows,), index of each row's last token, whose logits are looked at.
        draws: what is wanted of each row.
    """

    rows: list[Row]
    order: list[int]
    origins: list[int]
    block_size: int
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    contexts: Tensor
    tables: Tensor
    sampled: Tensor
    draws: list[Draw | None]

    @property
    def logits(self) -> None:
        """They may lie anywhere."""
        return None

    @classmethod
    def build(cls, rows: list[Row], *, block_size: int, device: torch.device | str = "cpu") -> "Batch":
        """Flatten at least one row of at least one token."""
        beginnings = Counter(row.table[0] for row in rows)
        origins = [row.table[0] if beginnings[row.table[0]] > 1 else 0 for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens), origins[i], rows[i].context))
        ordered = [rows[i] for i in order]
        starts = [0]
        for row in ordered:
            starts.append(starts[-1] + len(row.tokens))
        widest = max(-(-row.context // block_size) for row in ordered)

        def flat(numbers: list) -> Tensor:
            return to_device(numbers, device)

        return cls(
            rows=ordered,
            order=order,
            origins=[origins[i] for i in order],
            block_size=block_size,
            token_ids=flat([token for row in ordered for token in row.tokens]),
            positions=flat([position for row in ordered for position in range(row.start, row.context)]),
            slots=flat([slot for row in ordered for slot in row.slots(block_size)]),
            query_starts=flat(starts),
            contexts=flat([row.context for row in ordered]),
            tables=flat([[*row.table[:widest], *[0] * (widest - len(row.table))] for row in ordered]),
            sampled=flat([end - 1 for end in starts[1:]]),
            draws=[row.sample for row in ordered],
        )


def inverse(order: Sequence[int]) -> list[int]:
    """Where each of the numbers 0, 1, 2, … stands in `order`."""
    places = [0] * len(order)
    for place, index in enumerate(order):
        places[index] = place
    return places
