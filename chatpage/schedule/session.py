"""A session, as the scheduler knows it: who waits, who has had how much, whose table rests."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatpage.schedule.sequence import Sequence


@dataclass(eq=False, slots=True)
class Session:
    """One visitor, or one request without a session.

    Attributes:
        id: pseudonym that events carry.
        domain: the sharing domain of the blocks after the system prompt.
        keeps: whether tables rest when a turn ends; otherwise they are released.
        served: tokens computed for it so far; who has had least is admitted first.
        resting: the last turn, whose tables keep their references until the next one: one for each reply.
        rested_at: when the last of them ended, in seconds of the monotonic clock.
    """

    id: int
    domain: Hashable
    keeps: bool = True
    served: int = 0
    active: int = 0
    resting: "list[Sequence]" = field(default_factory=list)
    rested_at: float = 0.0
