"""What the engine knows of a turn: its sequences, the text that comes of them, and who reads it.

Turn      one sequence, whose tokens are drawn one by one and become text at once
Search    the beams of one prompt; what they say is certain when the search is over
"""

from collections.abc import Callable

from chatpage.model.batch import Drawn
from chatpage.schedule.beam import Finished
from chatpage.schedule.group import BeamGroup
from chatpage.schedule.request import Delta, FinishReason, Logprob, TurnState
from chatpage.schedule.scheduler import Scheduler
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session
from chatpage.stream import Stream
from chatpage.text.answer import Answer


class Turn:
    """A sequence, its text and its reader.

    Attributes:
        sequences: those that run for it now.
        streams: of those who read.
        made_way: how often it was preempted because memory was lacking, since it had `made_way_at` tokens.
    """

    def __init__(self, sequence: Sequence, answer: Answer, stream: Stream) -> None:
        self.streams = [stream]
        self.sequences = [sequence]
        self.made_way = 0
        self.made_way_at = 0
        self._sequence = sequence
        self._answer = answer

    @property
    def session(self) -> Session:
        return self._sequence.session

    @property
    def found(self) -> int:
        """How many tokens of its prompt were in the cache; a prompt with several replies counts once."""
        return 0 if self._sequence.origin else self._sequence.cached or 0

    def delta(
        self,
        state: TurnState,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[Logprob, ...] = (),
        reason: FinishReason | None = None,
    ) -> Delta:
        """How it is doing."""
        sequence = self._sequence
        length = sequence.prompt_length
        cached, computed = sequence.cached or 0, min(sequence.computed, length)
        return Delta(state, text, tokens, logprobs, length, cached, computed, len(sequence.tokens) - length, reason)

    def add(self, sequence: Sequence, drawn: Drawn) -> Delta | None:
        """Take in what a step gave to one of its sequences. Returns the news: with a reason, where it must end now."""
        token, logprob = drawn.token, drawn.logprob
        assert token is not None
        sequence.tokens.append(token)
        text, reason = self._answer.add(token)
        return self.delta("decode", text, (token,), (logprob,) if logprob else (), reason)

    def end(self, scheduler: Scheduler, reason: FinishReason) -> list[Sequence]:
        """Take its sequences from the scheduler. Returns who was preempted for that: see `Scheduler.fail`."""
        if reason == "error":
            return scheduler.fail(self._sequence, "failed")
        scheduler.end(self._sequence, reason)
        return []

    def last(self, reason: FinishReason, error: str | None, news: Delta | None) -> list[Delta]:
        """What each stream hears when it has ended, `news` included."""
        if news is None:  # cut off from outside: what was held back is certain now
            news = self.delta("done", self._answer.flush() if reason in ("abort", "length") else "")
        return [news._replace(state="done", finish_reason=reason, error=error)]


class Search(Turn):
    """The beams of a prompt, and a stream for each of the answers that are wanted."""

    def __init__(
        self, first: Sequence, group: BeamGroup, new_answer: Callable[[], Answer], streams: list[Stream]
    ) -> None:
        super().__init__(first, new_answer(), streams[0])
        self.streams = streams
        self._group = group
        self._new_answer = new_answer
        self._best: list[Finished] = []

    def delta(
        self,
        state: TurnState,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[Logprob, ...] = (),
        reason: FinishReason | None = None,
    ) -> Delta:
        """With the beams as they are, whatever becomes of the sequence that computed the prompt."""
        search = self._group.search
        beams = tuple(search.live) if search.length else ()
        told = super().delta(state, text, tokens, logprobs, reason)
        return told._replace(completion_tokens=search.length, beams=beams, finished=tuple(search.finished))

    def add(self, sequence: Sequence, drawn: Drawn) -> Delta | None:
        """None where other beams are still to come."""
        if not self._group.take(sequence, drawn.candidates):
            return None
        self.sequences = self._group.live
        return self.delta("decode", reason="stop" if self._group.search.is_over else None)

    def end(self, scheduler: Scheduler, reason: FinishReason) -> list[Sequence]:
        if reason == "error":
            return self._group.fail("failed")
        self._best = self._group.end(reason)
        return []

    def last(self, reason: FinishReason, error: str | None, news: Delta | None) -> list[Delta]:
        """Each stream hears one of the best answers; nothing, where so many were never possible."""
        deltas = [self._answered(finished, reason) for finished in self._best]
        nothing = self.delta("done", reason=reason)._replace(completion_tokens=0, beams=(), finished=())
        deltas += [nothing] * (len(self.streams) - len(deltas))
        return [delta._replace(error=error) for delta in deltas]

    def _answered(self, finished: Finished, reason: FinishReason) -> Delta:
        """An answer, up to the first stop string of the template, if it has one; the score is that of the whole.

        Whatever ended the search, an answer that met its end has ended by that.
        """
        answer, text, ending, count = self._new_answer(), "", None, 0
        while count < len(finished.tokens) and not ending:
            more, ending = answer.add(finished.tokens[count])
            text, count = text + more, count + 1
        text += "" if ending else answer.flush()
        news = self.delta("done", text, finished.tokens[:count], reason=ending or reason)
        return news._replace(completion_tokens=count, beams=(), finished=(), score=finished.score)
