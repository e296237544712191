"""From tokens to text and to an answer's end: no stop string leaks, whatever the tokenizer, the cuts and the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chatpage.text.answer import Answer
from chatpage.text.detokenize import detokenizer
from tests.text.samples import ALL_KINDS, HARD_TEXTS, byte_level

KINDS = pytest.mark.parametrize("tokenizer", [kind() for kind in ALL_KINDS], ids=[kind.__name__ for kind in ALL_KINDS])
NEVER = 10**6


def run(answer: Answer, ids: list[int]) -> tuple[list[str], str | None]:
    """The deltas as the engine sends them, and why the answer ended; None where it was cut off from outside."""
    parts = []
    for token in ids:
        text, reason = answer.add(token)
        parts.append(text)
        if reason is not None:
            return parts, reason
    return [*parts, answer.flush()], None


def expected(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], stops: tuple[str, ...], exempt: int
) -> tuple[str, bool]:
    """From the whole text alone: it ends where the first stop string is complete that ends after exempt tokens."""
    stream = detokenizer(tokenizer)
    passed = len("".join([stream.add(token) for token in ids[:exempt]]))
    if exempt >= len(ids):
        passed = NEVER
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for end in range(passed + 1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


@KINDS
@given(data=st.data())
@settings(max_examples=250, deadline=None)
def test_the_text_ends_before_the_first_stop_string(tokenizer, data):
    """Stops that are in the text, that overlap, that are heads of each other, and that never come."""
    text = data.draw(st.sampled_from(HARD_TEXTS) | st.text("ab \ud55c\u0e01\u0e47", min_size=1, max_size=30))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if data.draw(st.booleans()):
        ids = data.draw(st.lists(st.sampled_from([*ids, *range(len(tokenizer))]), max_size=40))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    begin = st.integers(0, max(0, len(whole) - 1))
    inside = st.builds(lambda at, length: whole[at : at + length] or "x", begin, st.integers(1, 6))
    stops = tuple(data.draw(st.lists(inside | st.text("ab \ud55c", min_size=1, max_size=3), max_size=4)))
    exempt = data.draw(st.just(0) | st.integers(0, len(ids)))
    answer = Answer(tokenizer, stop_token_ids=(), stops=stops, limit=NEVER, min_tokens=exempt)
    parts, reason = run(answer, ids)
    shown, met = expected(tokenizer, ids, stops, exempt)
    assert "".join(parts) == shown
    assert reason in (("stop", None) if met else (None,))
    assert exempt or not any(stop in "".join(parts) for stop in stops)


@KINDS
@given(text=st.sampled_from(HARD_TEXTS), cut=st.integers(1, 60), end=st.sampled_from(["limit", "token", "outside"]))
@settings(max_examples=150, deadline=None)
def test_what_is_held_back_is_shown_at_the_end_whatever_ends_it(tokenizer, text, cut, end):
    """Also half a character, and the head of a stop string: that is what decoding these tokens gives."""
    ids = tokenizer.encode(text, add_special_tokens=False)[:cut]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stops = (whole[-3:] + "!!", whole[-1:] + "?!")
    limit = len(ids) if end == "limit" else NEVER
    answer = Answer(tokenizer, stop_token_ids={tokenizer.eos_token_id}, stops=stops, limit=limit)
    parts, reason = run(answer, [*ids, tokenizer.eos_token_id] if end == "token" else ids)
    assert "".join(parts) == whole
    assert reason == {"limit": "length", "token": "stop", "outside": None}[end]


def test_a_stop_string_is_met_by_the_bytes_that_were_held_back_when_the_limit_comes():
    """Byte-fallback tokens are no text before their run ends."""
    tokenizer = ALL_KINDS[1]()
    ids = tokenizer.convert_tokens_to_ids(["<0x45>", "<0x4E>", "<0x44>"])
    assert run(Answer(tokenizer, stop_token_ids=(), stops=("ND",), limit=3), ids) == (["", "", "E"], "stop")
    assert run(Answer(tokenizer, stop_token_ids=(), stops=("ND",), limit=4), ids) == (["", "", "", "E"], None)
    assert run(Answer(tokenizer, stop_token_ids=(), stops=("NDX",), limit=3), ids) == (["", "", "END"], "length")


def test_stop_strings_count_from_the_token_after_min_tokens():
    """As in vLLM: one that is complete before is text; one that only begins there ends the answer, and is not shown."""
    tokenizer = byte_level()
    ids = tokenizer.convert_tokens_to_ids(list("abcabc"))

    def shown(stop: str, min_tokens: int) -> tuple[str, str | None]:
        parts, reason = run(Answer(tokenizer, stop_token_ids=(), stops=(stop,), limit=9, min_tokens=min_tokens), ids)
        return "".join(parts), reason

    assert shown("b", 0) == shown("b", 1) == ("a", "stop")
    assert shown("b", 2) == shown("b", 4) == ("abca", "stop")
    assert shown("b", 5) == ("abcabc", None)
    assert shown("bc", 2) == ("a", "stop")
    assert shown("bc", 3) == ("abca", "stop")


def test_a_stop_token_ends_the_answer_and_shows_nothing_of_itself():
    tokenizer = byte_level()
    ids = tokenizer.convert_tokens_to_ids(list("abcabc"))
    answer = Answer(tokenizer, stop_token_ids={ids[2]}, stops=("bX",), limit=9)
    assert run(answer, ids) == (["a", "", "b"], "stop")
