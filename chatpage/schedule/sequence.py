"""A sequence: tokens, and how many of them are computed. It has no phases; a step catches `computed` up."""

from typing import Literal

from chatpage.cache.table import BlockTable
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt
from chatpage.schedule.session import Session

State = Literal["queued", "prefill", "decode", "preempted", "resting", "done"]


class Sequence:
    """One turn on its way through the engine.

    Attributes:
        tokens: the prompt, then what was generated.
        computed: how many leading tokens have their keys and values in the pool.
        cached: how many prompt tokens were found at first admission; None before it.
        draws: whether a token is drawn after the last one; a system prompt's own sequence only fills blocks.
        awaits: another sequence that fills a block which this one needs too, and the number of its tokens by then.
    """

    __slots__ = (
        "awaits",
        "cached",
        "computed",
        "draws",
        "id",
        "params",
        "prompt_length",
        "seed",
        "session",
        "state",
        "system_tokens",
        "table",
        "tokens",
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
    ) -> None:
        self.id = id
        self.session = session
        self.tokens = list(prompt.tokens)
        self.prompt_length = len(prompt.tokens)
        self.system_tokens = prompt.system_tokens
        self.params = params
        self.table = table
        self.seed = seed
        self.draws = draws
        self.computed = 0
        self.cached: int | None = None
        self.awaits: tuple[Sequence, int] | None = None
        self.state: State = "queued"

    @property
    def is_running(self) -> bool:
        return self.state in ("prefill", "decode")

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length
