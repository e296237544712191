"""The live beams of one search as sequences, which fork and are dropped as the search goes on.

    search        A dog, The cat ─▶ A dog ran, A dog sat               what `BeamSearch.advance` says
    sequences     1: A dog          1: A dog ran                       goes on from its own block table
                  2: The cat        3: A dog sat       forked from 1   shares all blocks of 1, copies the last on write
                                    2                  dropped         gives back what only it held

A beam whose likeliest next tokens are known waits for those of the others: they go on together.
"""

from collections import defaultdict
from collections.abc import Iterable

from chatpage.schedule.beam import BeamSearch, Finished
from chatpage.schedule.scheduler import Scheduler
from chatpage.schedule.sequence import Sequence

Tokens = tuple[int, ...]


class BeamGroup:
    """One search, which begins with the sequence of its prompt.

    Attributes:
        live: the sequences of the live beams, in the order of `search.live`.
    """

    def __init__(self, scheduler: Scheduler, search: BeamSearch, first: Sequence) -> None:
        self.search = search
        self.live = [first]
        self._scheduler = scheduler
        self._session = first.session
        self._given: dict[Sequence, Iterable[tuple[int, float]]] = {}
        self._rested: dict[Tokens, Sequence] = {}  # of finished beams, whether or not they still rest

    def take(self, beam: Sequence, candidates: Iterable[tuple[int, float]]) -> bool:
        """Take in what a beam could go on with. With the last of them all move on. Returns whether they have."""
        self._given[beam], beam.waits = candidates, True
        if not all(other.waits for other in self.live):  # one may have been preempted, or be out of the step's budget
            return False
        self._move_on()
        return True

    def _move_on(self) -> None:
        before = [beam.tokens for beam in self.search.live]
        moves = self.search.advance([self._given[beam] for beam in self.live])
        self._given.clear()
        heirs: defaultdict[int, list[Tokens]] = defaultdict(list)
        for move in moves:
            heirs[move.parent].append((*before[move.parent], move.token))
        ended = self._newly_finished() if self._session.keeps else []
        for tokens in ended:
            heirs[before.index(tokens[:-1])].append(tokens)
        sequences = {tokens: beam for parent in heirs for tokens, beam in self._hand_down(parent, heirs[parent])}
        for parent, beam in enumerate(self.live):
            if parent not in heirs:
                self._scheduler.drop(beam, "the search is over" if self.search.is_over else "a likelier beam went on")
        self.live = [sequences[beam.tokens] for beam in self.search.live]
        for tokens in ended:
            self._rest(tokens, sequences[tokens])
        self._drop_worse(self.search.finished if self.live else self.search.best)

    def _newly_finished(self) -> list[Tokens]:
        finished = self.search.best if self.search.is_over else self.search.finished
        return [tokens for tokens, _ in finished if tokens not in self._rested]

    def _hand_down(self, parent: int, heirs: list[Tokens]) -> list[tuple[Tokens, Sequence]]:
        """Give a beam's block table to those that go on from it: the first keeps the sequence, the others fork it."""
        beam = self.live[parent]
        beams = [beam, *(self._scheduler.branch(beam) for _ in heirs[1:])]
        for tokens, heir in zip(heirs, beams, strict=True):
            heir.tokens.append(tokens[-1])
            heir.waits = False
        return list(zip(heirs, beams, strict=True))

    def _rest(self, tokens: Tokens, beam: Sequence) -> None:
        self._scheduler.end(beam, "the beam is finished")
        self._rested[tokens] = beam

    def _drop_worse(self, kept: list[Finished]) -> None:
        """Release finished beams that are not among these any more."""
        for tokens in self._rested.keys() - {tokens for tokens, _ in kept}:
            self._scheduler.let_go(self._rested.pop(tokens), "better beams have finished")

    def end(self, reason: str) -> list[Finished]:
        """The search is over, or cut off. Of a session that keeps, the tables of the best rest; all else is released.

        Returns:
            The best, the best first.
        """
        best = self.search.best
        live = {tuple(beam.tokens[beam.prompt_length :]): beam for beam in self.live}
        for tokens, beam in live.items():
            if any(tokens == chosen for chosen, _ in best):
                self._rest(tokens, beam)
            else:
                self._scheduler.drop(beam, reason)
        self._drop_worse(best)
        for choice, (tokens, _) in enumerate(best):
            if tokens in self._rested:
                self._rested[tokens].choice = choice
        self.live = []
        return best

    def fail(self, reason: str) -> list[Sequence]:
        """What was computed cannot be trusted: see `Scheduler.fail`. Returns who was preempted for that."""
        live, self.live = self.live, []
        preempted = [holder for beam in live for holder in self._scheduler.fail(beam, reason)]
        self._drop_worse([])
        return [holder for holder in preempted if holder not in live]
