"""From messages to token ids, by the model's own chat template."""

import re
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from chatpage.cache.prefix import common_length
from chatpage.errors import RequestError

Message = dict[str, str]

ROLES = ("system", "developer", "user", "assistant", "tool")

# For a tokenizer without a template: lines that a base model goes on with, and the end-of-text token after an answer.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + (eos_token or '') + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# What the template is tried with at load. The answers end in letters, which merge with nothing that may follow.
STUB: list[Message] = [
    {"role": "user", "content": "What is a block?"},
    {"role": "assistant", "content": "A block is a fixed number of Slots"},
]
TURN: list[Message] = [{"role": "user", "content": "And a slot?"}]
THOUGHT: Message = {"role": "assistant", "content": "<think>\nOne token, I think.\n</think>\n\nRoom for one Token"}
# Beginnings of user messages, no two of which have a character in common, the ones that merge with a newline included.
OPENINGS = ("a", "Zq", "7", "?!", "\nb", "  c", "ก", "한", "😀")

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: it is no character


class Beginning(NamedTuple):
    """What conversations begin with, and its ids, where the special token `part` follows."""

    text: str
    part: str
    ids: list[int]


class ChatTemplate:
    """One tokenizer's chat template.

    Text that spells a special token stays plain text: only the template itself can begin or end a message.

    Attributes:
        is_default: the tokenizer had no template, and the conversation is written in User:/Assistant: lines.
        additive: a later turn adds tokens at the end and changes none before, so a transcript of ids can be continued.
            False where the template drops or rewrites earlier messages, such as a model's thinking.
        end_of_turn: what the template puts after an assistant's answer, before the next turn.
        stops: strings that end an answer beside the end-of-turn token: a base model goes on to write the user's line.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.is_default = not tokenizer.chat_template
        self._source = self._default_source() if self.is_default else tokenizer.get_chat_template()
        special, written = self._control_tokens()
        self._special = _first_of(special)
        self._beginnings: list[Beginning] = []
        self._control = {True: _any_of(special), False: _any_of(special | written)}  # by: is it the assistant's?
        self.stops = ("\nUser:",) if self.is_default else ()
        self._newline = self._encode("\n")
        self.end_of_turn = self._find_end_of_turn()
        self.additive = self._find_whether_additive()

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> list[int]:
        """The ids of these messages; with `generate`, up to where the assistant's answer begins.

        Raises:
            RequestError: a message is malformed, or the template rejects the messages.
        """
        _check(messages)
        mark = f"\ue000{secrets.randbelow(10**18)}\ue000"  # nobody can guess it, so nobody can write it
        marked = [self._guard(i, message, mark) for i, message in enumerate(messages)]
        first, *rest = self._text(marked, generate=generate).split(mark)
        ids = self._encode_from_start(first)
        for piece in rest:
            ids += self._encode_inside(piece)
        return ids

    def system_prefix(self, system_prompt: str) -> list[int]:
        """The tokens that every conversation with this system prompt begins with, whatever the user says.

        An empty system prompt is none: what the template puts first by itself.

        Raises:
            RequestError: the template takes no system prompt.
        """
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        prefix = self.render([*system, TURN[0]])
        for opening in OPENINGS:
            other = self.render([*system, {"role": "user", "content": opening}])
            prefix = prefix[: common_length(prefix, other)]
        return prefix

    def remember(self, system_prompt: str) -> None:
        """Tokenise a system prompt once for all conversations under it.

        A special token parts a text: what stands before it is tokenised whatever comes after. So the ids of all that
        stands before the last one that these conversations have in common are known.
        """
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        texts = [self._text([*system, {"role": "user", "content": opening}], generate=True) for opening in OPENINGS]
        common = texts[0][: min(common_length(texts[0], text) for text in texts)]
        parts = list(self._special.finditer(common))
        if not parts or not parts[-1].start():
            return
        at = parts[-1].start()
        wholes, tails = [self._encode(text) for text in texts], [self._encode_inside(text[at:]) for text in texts]
        ids = wholes[0][: len(wholes[0]) - len(tails[0])]
        if all(whole == ids + tail for whole, tail in zip(wholes, tails, strict=True)):
            self._beginnings.append(Beginning(common[:at], parts[-1][0], ids))

    def follow_up(self, turn: list[Message]) -> list[int] | None:
        """The ids that a new turn adds after an ended answer; None where the template does not allow to add any.

        Raises:
            RequestError: as `render`.
        """
        return self._added(STUB, turn) if self.additive else None

    # -- what the template is like ---------------------------------------------------------------------------------

    def _default_source(self) -> str:
        """The default template, after a begin-of-text token where this tokenizer is used to one."""
        tokenizer = self._tokenizer
        begins = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        return ("{{ bos_token }}" if begins else "") + DEFAULT_TEMPLATE

    def _control_tokens(self) -> tuple[set[str], set[str]]:
        """The special tokens, and the ordinary added tokens that the template writes (a model's `<think>`).

        An assistant's message may hold the latter: the model has said them.
        """
        added = self._tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        written = {token.content for token in added if token.content in self._source and _is_markup(token.content)}
        return special, written

    def _find_end_of_turn(self) -> list[int]:
        answer = STUB[-1]["content"]
        try:
            text = self._text(STUB, generate=False)
        except RequestError:
            text = ""
        if answer not in text:
            eos = self._tokenizer.eos_token_id
            return [eos] if isinstance(eos, int) else []
        end = text.rindex(answer) + len(answer)
        return self._encode_inside(text[end:])

    def _find_whether_additive(self) -> bool:
        """Try several histories: does a turn add the same ids to each, and is every answer kept as it was?"""
        thinking = [*STUB, *TURN, THOUGHT]
        histories = [STUB, thinking, [*thinking, *STUB]]
        system = [{"role": "system", "content": "You are kind."}]
        if self._accepts([*system, *STUB, *TURN]):
            histories += [[*system, *history] for history in histories]
        try:
            expected = self._added(STUB, TURN)
            same = all(self._added(history, TURN) == expected for history in histories)
            return expected is not None and same and all(self._keeps_answer(history) for history in histories)
        except RequestError:
            return False

    def _accepts(self, messages: list[Message]) -> bool:
        try:
            self._text(messages, generate=True)
        except RequestError:
            return False
        return True

    def _added(self, history: list[Message], turn: list[Message]) -> list[int] | None:
        """What `turn` adds to the ids of `history`; None if it changes them."""
        before, after = self.render(history, generate=False), self.render([*history, *turn])
        return after[len(before) :] if after[: len(before)] == before else None

    def _keeps_answer(self, history: list[Message]) -> bool:
        """Whether the history has the last answer where it was generated, white space at its ends aside."""
        asked = self._text(history[:-1], generate=True)
        answered = self._text(history, generate=False)
        return answered.startswith(asked) and answered[len(asked) :].lstrip().startswith(history[-1]["content"])

    # -- text and ids ----------------------------------------------------------------------------------------------

    def _guard(self, index: int, message: Message, mark: str) -> Message:
        """The message with `mark` inside every control token that it spells, so that none is complete.

        The case is left open: a template may change it.
        """

        def broken(match: re.Match[str]) -> str:
            token = match.group(1)
            if len(token) == 1:
                raise RequestError(
                    f"messages[{index}].content has the character {token!r}, which is a special token of this model.",
                    param=f"messages[{index}].content",
                )
            return match.group(0) + mark

        control = self._control[message["role"] == "assistant"]
        return {**message, "content": control.sub(broken, message["content"])}

    def _text(self, messages: Sequence[Message], *, generate: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._source, add_generation_prompt=generate, tokenize=False
            )
        except Exception as error:  # the template is a program of the model's author: it may fail in any way
            raise RequestError(f"The model's chat template rejects the messages: {error}", param="messages") from error
        assert isinstance(text, str)  # one conversation in, one text out
        return text

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _encode_from_start(self, text: str) -> list[int]:
        for beginning in self._beginnings:
            if text.startswith(beginning.text + beginning.part):
                return beginning.ids + self._encode_inside(text[len(beginning.text) :])
        return self._encode(text)

    def _encode_inside(self, text: str) -> list[int]:
        """The ids of text that goes on from other text: at a start, some tokenizers add a space."""
        ids = self._encode("\n" + text)
        after_newline = ids[: len(self._newline)] == self._newline
        return ids[len(self._newline) :] if after_newline else self._encode(text)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise RequestError("messages is empty; it must hold at least one message.", param="messages")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RequestError(
                f"messages[{i}].role is {role!r}; it must be one of {', '.join(ROLES)}.", param=f"messages[{i}].role"
            )
        if not isinstance(content, str):
            raise RequestError(
                f"messages[{i}].content is {type(content).__name__}; it must be a string.",
                param=f"messages[{i}].content",
            )
        if SURROGATE.search(content):
            raise RequestError(
                f"messages[{i}].content has half of a surrogate pair; it must be valid Unicode text.",
                param=f"messages[{i}].content",
            )


def _first_of(tokens: set[str]) -> re.Pattern[str]:
    """Matches one of these tokens, the longest where several begin."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Matches the first character wherever one of these tokens begins, overlapping ones too; group 1 is the token."""
    if not tokens:
        return re.compile("(?!)")  # matches nothing
    choices = "|".join(map(re.escape, sorted(tokens, key=len)))
    return re.compile(f"(?=({choices})).", re.IGNORECASE | re.DOTALL)


def _is_markup(token: str) -> bool:
    """Neither a word nor white space, which a tokenizer may also have as added tokens."""
    return not all(character.isalnum() or character.isspace() for character in token)
