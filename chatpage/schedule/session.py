"""A session, as the scheduler knows it: who waits, who has had how much, whose table rests."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatpage.schedule.sequence import Sequence


@dataclass(eq=False, slots=True)
class Session:
    """One visitor, or one request without a session.

    Attributes:
        id: pseudonym that events carry.
        domain: the sharing domain of the blocks after the system prompt.
        keeps: whether the table rests when a turn ends; otherwise it is released.
        served: tokens computed for it so far; who has had least is admitted first.
        resting: the last turn, whose table keeps its references until the next one.
        rested_at: when that turn ended, in seconds of the monotonic clock.
    """

    id: int
    domain: Hashable
    keeps: bool = True
    served: int = 0
    active: int = 0
    resting: "Sequence | None" = None
    rested_at: float = 0.0
