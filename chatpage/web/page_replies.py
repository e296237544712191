"""What the page draws of a turn beside its text: how each of several replies is doing, and the beams of a search."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from chatpage.cache.prefix import common_length
from chatpage.conversation import Conversation, Exchange
from chatpage.schedule.request import Delta
from chatpage.web.page_text import decimal, tokens

MOST_CHARACTERS = 200  # of a beam: of what is longer, the end is drawn
MOST_SHARED = 24


def messages(conversation: Conversation) -> list[dict[str, str]]:
    """What the chat shows. Replies that stand side by side are as many messages after their question."""
    said = [dict(message) for message in conversation.messages]
    if conversation.replies:
        said = said[: 2 * len(conversation.shown) - 1]
        said += [{"role": "assistant", "content": reply.text} for reply in conversation.replies]
    return said


def states(conversation: Conversation) -> list[str]:
    """How each of the replies that stand side by side is doing."""
    return [_state(reply) for reply in conversation.replies]


def _state(reply: Exchange) -> str:
    if reply.finish_reason is not None:
        words = {"stop": "Ended", "length": "Cut at the limit", "abort": "Stopped", "error": "Failed"}
        return f"{words[reply.finish_reason]} · {tokens(len(reply.tokens))}"
    if reply.state == "preempted":
        return "Waiting for free blocks"
    if reply.state == "decode":
        return f"Writing · {tokens(len(reply.tokens))}"
    return "Queued" if reply.state == "queued" else "Reading"


def together(deltas: Sequence[Delta]) -> Delta:
    """The last deltas of several replies as if they were of one answer. The first tells of the prompt they share."""
    running = [delta for delta in deltas if delta.state != "done"]
    states = [delta.state for delta in running]
    state = next((state for state in ("decode", "prefill", "preempted", "queued") if state in states), "done")
    reasons = {delta.finish_reason for delta in deltas}
    return deltas[0]._replace(
        state=state,
        completion_tokens=sum(delta.completion_tokens for delta in deltas),
        finish_reason=None if running else reasons.pop() if len(reasons) == 1 else "stop",
    )


def search(reply: Exchange, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The beams of a search that goes on, as `page_beams.js` draws them: what one shares with one above it is short."""
    texts = [_text(beam.tokens, tokenizer) for beam in (*reply.beams, *reply.finished)]
    scores = [beam.score for beam in (*reply.beams, *reply.finished)]
    rows = [_row(score, text, texts[:index]) for index, (score, text) in enumerate(zip(scores, texts, strict=True))]
    return {"live": rows[: len(reply.beams)], "finished": rows[len(reply.beams) :]}


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # one sequence in, one text out
    return text


def _row(score: float, text: str, above: list[str]) -> dict[str, str]:
    common = text[: max((common_length(text, other) for other in above), default=0)]
    shared = common[: common.rfind(" ") + 1]  # in whole words
    return {
        "score": decimal(score),
        "shared": _end(shared, MOST_SHARED),
        "text": _end(text[len(shared) :], MOST_CHARACTERS),
    }


def _end(text: str, most: int) -> str:
    """All of a short text, or the last words of a long one."""
    if len(text) <= most:
        return text
    end = text[-most:]
    return f"… {end[end.find(' ') + 1 :]}"
