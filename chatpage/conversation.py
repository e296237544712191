"""A session's conversation. The server's copy is the truth while the session lives; the page only shows it."""

from dataclasses import dataclass, field

from chatpage.engine import Engine, OpenSession
from chatpage.errors import RequestError
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, FinishReason, Prompt, Request
from chatpage.stream import Stream
from chatpage.text.template import Message


@dataclass(eq=False, slots=True)
class Exchange:
    """One question and its answer, as far as it has come. The engine's thread writes, others read."""

    question: str
    prompt: Prompt
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stream: Stream | None = None

    def hear(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason

    @property
    def done(self) -> bool:
        return self.finish_reason is not None


class Conversation:
    """One visitor's chat. Between turns its blocks rest; editing or regenerating keeps every block before that point.

    Args:
        system_prompt: a registered one is shared with all who use it, any other stays private; None is the default.
    """

    def __init__(self, engine: Engine, system_prompt: str | None = None) -> None:
        self.engine = engine
        self.system_prompt = system_prompt
        self.session: OpenSession = engine.open_session()
        self._exchanges: list[Exchange] = []

    @property
    def messages(self) -> list[Message]:
        """What was said, without the system prompt."""
        said: list[Message] = []
        for exchange in self._exchanges:
            said.append({"role": "user", "content": exchange.question})
            if exchange.text or exchange.done:
                said.append({"role": "assistant", "content": exchange.text})
        return said

    @property
    def busy(self) -> bool:
        return bool(self._exchanges) and not self._exchanges[-1].done

    def say(self, text: str, params: SamplingParams) -> Stream:
        """The next turn.

        Raises:
            RequestError: the text is empty, too long, or an answer is still being written. Nothing is lost then.
        """
        return self._ask(self._exchanges, text, params)

    def regenerate(self, params: SamplingParams) -> Stream:
        """Answer the last question again."""
        if not self._exchanges:
            raise RequestError("There is no question yet that could be answered again.")
        return self._ask(self._exchanges[:-1], self._exchanges[-1].question, params)

    def edit(self, index: int, text: str, params: SamplingParams) -> Stream:
        """Put another question in place of message number `index`, and forget what came after it."""
        if not 0 <= index < 2 * len(self._exchanges) or index % 2:
            raise RequestError(f"Message {index} cannot be edited; only your own messages can.", param="index")
        return self._ask(self._exchanges[: index // 2], text, params)

    def stop(self) -> None:
        """End the running answer. What it has so far stays."""
        if self._exchanges and self._exchanges[-1].stream is not None:
            self._exchanges[-1].stream.cancel()

    def clear(self) -> None:
        """Forget everything and begin anew."""
        self.close()
        self._exchanges = []
        self.session = self.engine.open_session()

    def close(self) -> None:
        """Stop, and give all blocks back. Harmless the second time. What was said stays, and can be gone on from."""
        self.engine.close_session(self.session.key)

    def _ask(self, before: list[Exchange], text: str, params: SamplingParams) -> Stream:
        if self.busy:
            raise RequestError("The last answer is still being written; stop it first.")
        if not text.strip():
            raise RequestError("The message is empty.", param="messages")
        if not self.engine.has_session(self.session.key):  # closed meanwhile: its text lives here
            self.session = self.engine.open_session()
        exchange = Exchange(text, self._prompt(before, text))
        request = Request(exchange.prompt, params, session=self.session.key)
        exchange.stream = self.engine.stream(request, exchange.hear)
        self._exchanges = [*before, exchange]
        return exchange.stream

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

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []

    @staticmethod
    def _said(exchanges: list[Exchange]) -> list[Message]:
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
