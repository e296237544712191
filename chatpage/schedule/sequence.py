"""A sequence: tokens, and how many of them are computed. It has no phases; a step catches `computed` up.

    a step is in flight            tokens  T h e _ c a t     computed 6     table.length 7     pending 1
    a step is prepared meanwhile   tokens  T h e _ c a t     computed 6     table.length 8     pending 2
    the first one is read back     tokens  T h e _ c a t s   computed 7     table.length 8     pending 1

`computed` and `tokens` move when a step is read back, `table.length` and `pending` as soon as one is scheduled.
"""

from typing import Literal

from chatpage.cache.table import BlockTable
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.session import Session

State = Literal["queued", "prefill", "decode", "preempted", "resting", "done"]


class Sequence:
    """A reply, or one beam of a search, on its way through the engine.

    Attributes:
        tokens: the prompt, then what was generated.
        pending: how many more tokens are drawn by steps that are not read back yet.
        computed: how many leading tokens are known to have their keys and values in the pool.
        limit: at so many tokens it ends, if nothing ends it before; None where nobody knows.
        life: grows when it ends or loses its blocks: what a step computed for it in an earlier life does not count.
        cached: how many prompt tokens were found at first admission; None before it.
        draws: whether a token is drawn after the last one; a system prompt's own sequence only fills blocks.
        looks_back: whether a token can only be drawn once the one before it is known here, not only on the device. No
            step that draws for it stays in flight. Whatever else needs that says so here.
        turn: the id of the first sequence of its turn: what all replies to one prompt, and all beams, have in common.
        origin: another reply to the same prompt, whose table it forks when the prompt is computed; None is the first.
        choice: which of the replies it is, from 0 on.
        width: how many beams its turn may have at once; 1 where it is no beam.
        candidates: so many of the likeliest tokens are wanted after the last one, instead of one that is drawn.
        waits: whether they are known, and it waits for those of the other beams.
        awaits: another sequence that fills a block which this one needs too, and the number of its tokens by then.
    """

    __slots__ = (
        "awaits",
        "cached",
        "candidates",
        "choice",
        "computed",
        "draws",
        "id",
        "life",
        "limit",
        "looks_back",
        "origin",
        "params",
        "pending",
        "prompt_length",
        "seed",
        "session",
        "state",
        "system_tokens",
        "table",
        "tokens",
        "turn",
        "waits",
        "width",
    )

    def __init__(
        self,
        id: int,
        session: Session,
        prompt: Prompt,
        params: SamplingParams,
        table: BlockTable,
        *,
        seed: int = 0,
        draws: bool = True,
        limit: int | None = None,
        width: int = 1,
        candidates: int = 0,
    ) -> None:
        self.id = self.turn = id
        self.session = session
        self.tokens = list(prompt.tokens)
        self.prompt_length = len(prompt.tokens)
        self.system_tokens = prompt.system_tokens
        self.params = params
        self.table = table
        self.seed = seed
        self.draws = draws
        self.limit = limit
        self.origin: Sequence | None = None
        self.choice = 0
        self.width = width
        self.candidates = candidates
        self.waits = False
        self.looks_back = params.penalizes or candidates > 0
        self.computed = 0
        self.pending = 0
        self.life = 0
        self.cached: int | None = None
        self.awaits: tuple[Sequence, int] | None = None
        self.state: State = "queued"

    def drop_pending(self) -> None:
        """What steps in flight compute for it does not count any more."""
        self.life += 1
        self.pending = 0
        self.waits = False

    @property
    def age(self) -> tuple[int, int]:
        """Who is smaller is older. Beams that were forked lately are as old as their turn."""
        return self.turn, self.id

    @property
    def is_running(self) -> bool:
        return self.state in ("prefill", "decode")

    @property
    def length(self) -> int:
        """How many tokens it has, those that are not known yet included."""
        return len(self.tokens) + self.pending

    @property
    def is_in_flight(self) -> bool:
        """Whether a step computes something of it that is not read back yet."""
        return self.pending > 0 or self.computed < self.table.length

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length
