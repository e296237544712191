"""A session's conversation. The server's copy is the truth while the session lives; the page only shows it.

    What is a block? A block is …  ─┬─ And a slot? A slot is …
                                    └─ And a page? A page is …  ─── Why? Because …

It is a tree of exchanges, each a question and its answer, and one branch of it is shown. To edit, to answer again and
to branch add an exchange beside another one; several replies to one question are as many. What branches have in common
is found by its content: it is computed and stored once.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from chatpage.engine import Engine, OpenSession
from chatpage.errors import RequestError
from chatpage.schedule.beam import Beam, Beams, Finished
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, FinishReason, Prompt, Request, TurnState
from chatpage.stream import Stream

if TYPE_CHECKING:
    from chatpage.text.template import Message

MAX_EXCHANGES = 1000  # of one conversation, in all its branches: each keeps the tokens of its prompt


@dataclass(eq=False, slots=True)
class Exchange:
    """One question and its answer, as far as it has come. The engine's thread writes, others read.

    Attributes:
        before: the exchange that this one goes on from; None at the beginning of a conversation.
        choice: which of the replies to its question it is, from 0.
        beams, finished: of a beam search that goes on: see `Delta`.
        score: of an answer that was searched for: see `Finished`.
    """

    question: str
    prompt: Prompt
    before: "Exchange | None" = None
    choice: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    state: TurnState = "queued"
    beams: tuple[Beam, ...] = ()
    finished: tuple[Finished, ...] = ()
    score: float | None = None
    finish_reason: FinishReason | None = None
    stream: Stream | None = None

    def hear(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.beams, self.finished, self.score = delta.beams, delta.finished, delta.score
        self.state, self.finish_reason = delta.state, delta.finish_reason

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def path(self) -> "list[Exchange]":
        """All exchanges from the first one to this one."""
        path: list[Exchange] = [self]
        while path[-1].before is not None:
            path.append(path[-1].before)
        return path[::-1]


class Place(NamedTuple):
    """Which of the branches that part at a message is shown: number 2 of 3."""

    number: int
    count: int


class Conversation:
    """One visitor's chat. Between turns its blocks rest; whatever is asked anew keeps every block before that point.

    Messages are counted along the branch that is shown: 0 is its first question, 1 the answer to it. One thread at a
    time may change a conversation; any may read it.

    Args:
        system_prompt: a registered one is shared with all who use it, any other stays private; None is the default.
        like: a session of the same visitor, whose blocks this conversation may find.
    """

    def __init__(self, engine: Engine, system_prompt: str | None = None, *, like: OpenSession | None = None) -> None:
        self.engine = engine
        self.system_prompt = system_prompt
        self.session: OpenSession = engine.open_session(like)
        self._asked: list[Exchange] = []  # in all branches, in the order in which they were asked
        self._exchanges: list[Exchange] = []  # the shown branch; replaced and never changed, since others read it
        self._turn: list[Exchange] = []  # the replies that were asked for last
        self._chosen = True  # which of them to go on from
        self._shown_after: dict[Exchange | None, Exchange] = {}  # which way was shown last after each exchange

    # -- what was said --------------------------------------------------------------------------------------------

    @property
    def messages(self) -> "list[Message]":
        """What was said in the branch that is shown, without the system prompt."""
        said: list[Message] = []
        for exchange in self.shown:
            said.append({"role": "user", "content": exchange.question})
            if exchange.text or exchange.done:
                said.append({"role": "assistant", "content": exchange.text})
        return said

    @property
    def shown(self) -> list[Exchange]:
        """The exchanges of the branch that is shown. Where replies stand side by side, it ends with the foremost."""
        return list(self._exchanges) if self._chosen else self._foremost.path()

    @property
    def asked(self) -> list[Exchange]:
        """The exchanges of all branches, in the order in which they were asked."""
        return list(self._asked)

    @property
    def turn(self) -> list[Exchange]:
        """The replies that were asked for last; most often one."""
        return list(self._turn)

    @property
    def replies(self) -> list[Exchange]:
        """Several replies that stand side by side, until one is chosen; none where there is nothing to choose."""
        return [] if self._chosen else self.turn

    @property
    def busy(self) -> bool:
        return any(not reply.done for reply in self._turn)

    def branches(self, index: int) -> Place:
        """Which of the branches that part at message `index` is shown. A question and its answer part together.

        Raises:
            RequestError: there is no such message.
        """
        exchange = self._at(index)
        beside = self._beside(exchange)
        return Place(beside.index(exchange) + 1, len(beside))

    @property
    def partings(self) -> dict[int, Place]:
        """The messages of the shown branch at which branches part, and which of those is shown.

        Branches that begin with the same question part at its answer, any others at the question.
        """
        beside: dict[Exchange | None, list[Exchange]] = defaultdict(list)
        for exchange in self._asked:
            beside[exchange.before].append(exchange)
        partings: dict[int, Place] = {}
        for number, exchange in enumerate(self.shown):
            others = beside[exchange.before]
            if len(others) > 1:
                again = all(other.question == exchange.question for other in others)
                partings[2 * number + again] = Place(others.index(exchange) + 1, len(others))
        return partings

    # -- asking ---------------------------------------------------------------------------------------------------

    def say(self, text: str, params: SamplingParams, *, replies: int = 1, beams: Beams | None = None) -> Stream:
        """The next turn.

        Args:
            replies: how many answers to write side by side; `turn` has them all, and one is chosen by `choose`.
            beams: search for the likeliest answer instead of drawing it.

        Returns:
            The stream of the first reply.

        Raises:
            RequestError: the text is empty, too long, or an answer is still being written. Nothing is lost then.
        """
        return self._ask(self.shown, text, params, replies, beams)

    def regenerate(self, params: SamplingParams, *, replies: int = 1, beams: Beams | None = None) -> Stream:
        """Answer the last question again. The answer that it has stays, in a branch of its own."""
        if not self._exchanges:
            raise RequestError("There is no question yet that could be answered again.")
        *before, last = self.shown
        return self._ask(before, last.question, params, replies, beams, last.prompt)

    def edit(
        self, index: int, text: str, params: SamplingParams, *, replies: int = 1, beams: Beams | None = None
    ) -> Stream:
        """Put another question in place of message `index`. That one and what came after it stay, in their branch."""
        if not 0 <= index < 2 * len(self._exchanges) or index % 2:
            raise RequestError(f"Message {index} cannot be edited; only your own messages can.", param="index")
        return self.branch(index, text, params, replies=replies, beams=beams)

    def branch(
        self, index: int, text: str, params: SamplingParams, *, replies: int = 1, beams: Beams | None = None
    ) -> Stream:
        """Ask something else after message `index`, or in its place where it is a question.

        Raises:
            RequestError: as `say`, or there is no such message.
        """
        return self._ask(self._until(index), text, params, replies, beams)

    def choose(self, number: int) -> None:
        """Go on from reply `number` of `replies`, from 1. The others end, give their blocks back, and are branches.

        Where none is chosen, whatever is done next goes on from the foremost: the first that has not failed.

        Raises:
            RequestError: there is no such reply, or nothing to choose.
        """
        if self._chosen:
            raise RequestError("There are no replies to choose from any more.", param="number")
        if not 1 <= number <= len(self._turn):
            raise RequestError(
                f"Reply {number} is not there; it must be one of 1 to {len(self._turn)}.", param="number"
            )
        self._choose(self._turn[number - 1])

    def stop(self) -> None:
        """End the running answer, or all replies that are running. What they have so far stays."""
        for reply in self._turn:
            if reply.stream is not None:
                reply.stream.cancel()

    # -- moving between branches ----------------------------------------------------------------------------------

    def switch(self, index: int, number: int) -> None:
        """Show another of the branches that part at message `index`, with what was shown last after it.

        Args:
            number: from 1 to the count that `branches` tells.

        Raises:
            RequestError: there is no such message or branch, or an answer is still being written.
        """
        beside = self._beside(self._at(index))
        if not 1 <= number <= len(beside):
            raise RequestError(
                f"Branch {number} of message {index} is not there; it must be one of 1 to {len(beside)}.",
                param="number",
            )
        self.show(beside[number - 1])

    def show(self, exchange: Exchange) -> None:
        """Show the branch with this exchange, one of `asked`, and what was shown last after it.

        Raises:
            RequestError: an answer is still being written.
        """
        self._require_quiet()
        if not self._chosen:
            self._choose(self._foremost)
        path = exchange.path()
        self._remember(path)
        while (following := self._shown_after.get(path[-1])) is not None:
            path.append(following)
        self._exchanges = path

    def fork(self, index: int) -> "Conversation":
        """A second conversation, which begins with everything up to message `index`: a question there is left out.

        Its session is another one of the same visitor's, so it finds every block that the two have in common.

        Raises:
            RequestError: there is no such message, or it is still being written.
        """
        path = self._until(index)
        if path and not path[-1].done:
            self._require_quiet()
        other = Conversation(self.engine, self.system_prompt, like=self.session)
        other._asked, other._exchanges = list(path), path
        other._remember(path)
        return other

    # -- the end --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all branches and begin anew."""
        self.close()
        self._chosen = True
        self._asked, self._exchanges, self._turn, self._shown_after = [], [], [], {}
        self.session = self.engine.open_session()

    def close(self) -> None:
        """Stop, and give all blocks back. Harmless the second time. What was said stays, and can be gone on from."""
        self.engine.close_session(self.session.key)

    def reopen(self, like: OpenSession | None = None) -> None:
        """Take a new session where the old one was closed; `like` as for a new conversation."""
        if not self.engine.has_session(self.session.key):
            self.session = self.engine.open_session(like)

    # -- the tree -------------------------------------------------------------------------------------------------

    def _at(self, index: int) -> Exchange:
        """The exchange that message `index` is part of."""
        last = 2 * len(self._exchanges) - 1
        if not 0 <= index <= last:
            there = f"the last one is {last}" if last > 0 else "there is none yet"
            raise RequestError(f"Message {index} is not there; {there}.", param="index")
        return self.shown[index // 2]

    def _until(self, index: int) -> list[Exchange]:
        """The exchanges up to message `index`. A question cannot be gone on from, so its exchange is left out."""
        self._at(index)
        return self.shown[: (index + 1) // 2]

    def _beside(self, exchange: Exchange) -> list[Exchange]:
        """All that go on from the same exchange, this one among them."""
        return [other for other in self._asked if other.before is exchange.before]

    @property
    def _foremost(self) -> Exchange:
        """The reply to go on from where none was chosen."""
        return next((reply for reply in self._turn if reply.finish_reason != "error"), self._turn[0])

    def _choose(self, reply: Exchange) -> None:
        self._exchanges = reply.path()
        self._chosen = True
        self._remember(self._exchanges)
        self.engine.keep_reply(self.session.key, reply.choice)

    def _remember(self, path: list[Exchange]) -> None:
        for exchange in path:
            self._shown_after[exchange.before] = exchange

    def _require_quiet(self) -> None:
        if self.busy:
            raise RequestError("The last answer is still being written; stop it first.")

    # -- one turn -------------------------------------------------------------------------------------------------

    def _ask(
        self,
        before: list[Exchange],
        text: str,
        params: SamplingParams,
        replies: int,
        beams: Beams | None,
        prompt: Prompt | None = None,
    ) -> Stream:
        """New branches after `before`, one for each reply; with `prompt`, which its tokens are known to be."""
        self._require_quiet()
        if not text.strip():
            raise RequestError("The message is empty.", param="messages")
        if len(self._asked) + replies > MAX_EXCHANGES:
            raise RequestError(
                f"This conversation has {len(self._asked)} questions in all its branches, and {MAX_EXCHANGES} is the "
                "most; begin anew."
            )
        self.reopen()  # it may have been closed meanwhile: its text lives here
        prompt = prompt or self._prompt(before, text)
        turn = [Exchange(text, prompt, before[-1] if before else None, choice) for choice in range(replies)]
        request = Request(prompt, params, session=self.session.key, beams=beams)
        streams = self.engine.streams(request, [reply.hear for reply in turn])
        for reply, stream in zip(turn, streams, strict=True):
            reply.stream = stream
        self._asked += turn
        self._turn, self._chosen = turn, replies == 1
        self._exchanges = [*before, turn[0]]
        self._remember(self._exchanges)
        return streams[0]

    def _prompt(self, before: list[Exchange], text: str) -> Prompt:
        """The tokens of everything so far and one more question.

        The tokens that are in the cache already are kept as they are, and only the new turn is rendered: a template
        that would write the past differently cannot spoil what was computed.
        """
        turn: Message = {"role": "user", "content": text}
        self.engine.require_size([turn])
        goes_on = bool(before) and not self._met_a_stop_string(before[-1])
        follow_up = self.engine.template.follow_up([turn]) if goes_on else None
        if follow_up is None:
            return self.engine.prompt([*self._system(), *self._said(before), turn])
        last = before[-1]
        tokens = (*last.prompt.tokens, *last.tokens, *self._closing(last.tokens), *follow_up)
        self.engine.require_room(len(tokens))
        return Prompt(tokens, last.prompt.system_tokens)

    def _system(self) -> "list[Message]":
        return [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []

    @staticmethod
    def _said(exchanges: list[Exchange]) -> "list[Message]":
        pairs = [({"role": "user", "content": e.question}, {"role": "assistant", "content": e.text}) for e in exchanges]
        return [message for pair in pairs for message in pair]

    def _met_a_stop_string(self, exchange: Exchange) -> bool:
        """Its last tokens spell the stop string then, which is no part of the answer."""
        ends_by_token = exchange.tokens and exchange.tokens[-1] in self.engine.core.stop_token_ids
        return exchange.finish_reason == "stop" and not ends_by_token

    def _closing(self, answer: list[int]) -> list[int]:
        """What is missing of the template's end of turn: all of it after an answer that was stopped."""
        end = self.engine.template.end_of_turn
        if answer and answer[-1] in self.engine.core.stop_token_ids and answer[-1] in end:
            return end[end.index(answer[-1]) + 1 :]
        return end
