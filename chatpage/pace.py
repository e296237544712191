"""How large steps may be: for a while after memory was lacking, no larger than what there was memory for."""

from chatpage.schedule.scheduler import Scheduler

CALM = 64  # steps after which larger ones are tried again


class Pace:
    """Slows a scheduler down, and lets it go again.

    Args:
        scheduler: as fast as it may ever be.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._usual = scheduler.max_step_tokens, scheduler.max_sequences
        self._fitting = 0  # tokens of the largest part of this step that had memory
        self._lacking = False  # whether a part had none
        self._left = 0  # steps before larger ones are tried again

    def fits(self, tokens: int) -> None:
        """There was memory for so many tokens at once."""
        self._fitting = max(self._fitting, tokens)

    def is_lacking(self) -> None:
        """A part of a step that ran again still had too little memory."""
        self._lacking = True

    def next_step(self) -> None:
        """All that belongs to one step was heard."""
        if self._lacking:
            self._slow_down()
        elif self._left:
            self._left -= 1
            if not self._left:
                self._scheduler.max_step_tokens, self._scheduler.max_sequences = self._usual
        self._fitting, self._lacking = 0, False

    def _slow_down(self) -> None:
        """Smaller steps; and who made way comes back when another one has ended, or after a while."""
        self._scheduler.max_step_tokens = max(1, self._fitting)
        self._scheduler.max_sequences = max(1, len(self._scheduler.running))
        self._left = CALM
