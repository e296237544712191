"""Beam search: the likeliest answers as a whole, not token by token.

Several beginnings of an answer, the live beams, grow side by side, a token a step. Of all that they could go on with,
the likeliest `width` live on, whichever beams these come from. One that meets an end token is finished.

    width 2    live             what they could go on with              finished
    step 1     (the prompt)     A -0.5   The -1.2   ■ -3.0
    step 2     A   -0.5         A dog -1.1   The cat -1.3   A ■ -1.8    (A ■ comes too late: two are likelier)
               The -1.2
    step 3     A dog   -1.1     The cat ■ -1.4   A dog ran -1.6         The cat ■ -1.4 / 3
               The cat -1.3     A dog sat -1.9
    step 4     A dog ran -1.6   …
               A dog sat -1.9

The algorithm is old (B. Lowerre, "The Harpy speech recognition system", 1976). Programs differ in the details: what
counts as finished, over which length a score is normalised, when the search is over. All of them, rounding to 32 bits
included, are here as in `generate(num_beams=…)` of Hugging Face transformers, so the answers and their scores are the
same. Two differences. Of equal scores, which torch takes in any order, those of the likelier beam come first, and then
those handed in first. And what has no probability never lives on: there are fewer beams than `width` until so many are
possible, where transformers fills up with impossible ones.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from ctypes import c_float
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

from chatpage.errors import RequestError
from chatpage.schedule.params import MAX_REPLIES, require_number, require_whole, shortened

MAX_WIDTH = MAX_REPLIES


@dataclass(frozen=True, slots=True)
class Beams:
    """What a request wants of beam search. Wrong values are refused here, by name.

    Attributes:
        width: how many beams live at once. One beam alone is greedy.
        length_penalty: a finished beam's score is its sum of log-probabilities, which is negative, divided by
            length ** length_penalty; the length is that of the answer, with its end token. Above 0 favours long
            answers, below 0 short ones. Between -5 and 5 the quotients fit into 32 bits.
        early_stopping: when to end, once `width` beams have finished. True: at once. False: if the best live beam, were
            it to finish now, would be no better than the worst of them. "never": if it could not become better even
            with certain tokens only, at the length that favours it most.
        returned: how many of the best finished beams are the answer; at most `width`.
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    returned: int = 1

    def __post_init__(self) -> None:
        require_whole("beam_width", self.width, 1, MAX_WIDTH)
        require_number("length_penalty", self.length_penalty, -5, 5)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                f'early_stopping is {shortened(self.early_stopping)}; it must be true, false or "never".',
                param="early_stopping",
            )
        require_whole("The number of answers", self.returned, 1, self.width, param="n")


class Beam(NamedTuple):
    """A live beam: what it has generated, and the sum of its tokens' log-probabilities."""

    tokens: tuple[int, ...]
    score: float


class Finished(NamedTuple):
    """A finished beam: what it has generated, its end token included if it met one, and its normalised score."""

    tokens: tuple[int, ...]
    score: float


class Move(NamedTuple):
    """One of the beams that live on: which of those before the step it comes from, its new token and its score."""

    parent: int
    token: int
    score: float


class BeamSearch:
    """One prompt's beams. It starts with a single live one that has no tokens yet: the prompt.

    Attributes:
        live: the likeliest first; at most `width`, and none once the search is over.
        finished: the best first; at most `width`.
        length: how many tokens each live beam has.
    """

    def __init__(self, wish: Beams, *, stop_token_ids: Collection[int], max_tokens: int) -> None:
        """`max_tokens` (at least 1) is how many tokens an answer may have: whatever is as long counts as finished."""
        self.live = [Beam((), 0.0)]
        self.finished: list[Finished] = []
        self._wish = wish
        self._stops = frozenset(stop_token_ids)
        self._max_tokens = max_tokens
        self.length = 0

    @property
    def candidates(self) -> int:
        """So many of each live beam's likeliest tokens are enough.

        All that lives on may come from one beam, where every end token may be likelier.
        """
        return self._wish.width + len(self._stops)

    @property
    def is_over(self) -> bool:
        return not self.live

    @property
    def best(self) -> list[Finished]:
        """The `returned` best, the best first; fewer if so many were never possible.

        Before the search is over: what it would have been with `max_tokens` reached here. So a search may be cut off.
        """
        return self._with_finished(self.live)[: self._wish.returned]

    def advance(self, given: Sequence[Iterable[tuple[int, float]]]) -> list[Move]:
        """Take a step.

        Args:
            given: for each live beam, in their order, (token, log-probability) of its likeliest next tokens, the
                likeliest first: `candidates` of them, or all that there are.

        Returns:
            Which beams live on, the likeliest first, as `live` has them now; none if the search is over.

        Raises:
            ValueError: `given` has not one entry for each live beam.
        """
        ranked = self._ranked(given)
        self.length += 1
        # An end token that is not among the `width` likeliest has come too late: its beam is dropped.
        ended = [move for move in ranked[: self._wish.width] if self._ends(move)]
        moves = [move for move in ranked if not self._ends(move)][: self._wish.width]
        self.finished = self._with_finished(self._grown(ended))
        self.live = self._grown(moves)
        if self.live and not self._may_improve():
            self.live = []
        return moves if self.live else []

    def _ranked(self, given: Sequence[Iterable[tuple[int, float]]]) -> list[Move]:
        moves = [
            Move(parent, token, _rounded(beam.score + logprob))
            for parent, (beam, tokens) in enumerate(zip(self.live, given, strict=True))
            for token, logprob in self._that_count(tokens)
        ]
        return sorted(moves, key=lambda move: move.score, reverse=True)  # equal ones stay in their order

    def _that_count(self, tokens: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float]]:
        """Of one beam's likeliest tokens those that can make a difference: `width` that end it, and `width` others."""
        left = {True: self._wish.width, False: self._wish.width}
        for token, logprob in tokens:
            ends = token in self._stops
            if left[ends] and logprob > -inf:
                left[ends] -= 1
                yield token, logprob

    def _ends(self, move: Move) -> bool:
        return self.length == self._max_tokens or move.token in self._stops

    def _grown(self, moves: list[Move]) -> list[Beam]:
        return [Beam((*self.live[move.parent].tokens, move.token), move.score) for move in moves]

    def _with_finished(self, beams: list[Beam]) -> list[Finished]:
        """The best of the finished beams and of these, as if they finished now."""
        ended = [Finished(beam.tokens, self._normalised(beam.score, self.length)) for beam in beams]
        return sorted(self.finished + ended, key=lambda beam: beam.score, reverse=True)[: self._wish.width]

    def _may_improve(self) -> bool:
        """Whether the live beams are worth going on with, by the wish's `early_stopping`."""
        wish = self._wish
        if len(self.finished) < wish.width:
            return True
        if wish.early_stopping is True or wish.width == 1:
            return False
        grows = wish.early_stopping == "never" and wish.length_penalty > 0
        length = self._max_tokens if grows else self.length
        return self._normalised(self.live[0].score, length) > self.finished[-1].score

    def _normalised(self, score: float, length: int) -> float:
        if length == 0:  # cut off before its first token
            return score
        return _rounded(score / _rounded(length**self._wish.length_penalty))


def _rounded(number: float) -> float:
    """To 32 bits. A sum or quotient of such numbers is exactly what 32-bit arithmetic gives, rounded only once."""
    return c_float(number).value
