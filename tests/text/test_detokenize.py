import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chatpage.text.detokenize import detokenizer
from tests.text.samples import ALL_KINDS, BYTES, HARD_TEXTS, byte_level

KINDS = pytest.mark.parametrize("tokenizer", [kind() for kind in ALL_KINDS], ids=[kind.__name__ for kind in ALL_KINDS])
# Beyond the vocabulary too: models have more rows than their tokenizer has tokens.
ANY_IDS = st.lists(st.integers(0, 430), max_size=60)
# Byte-level BPE writes a byte that is no printable character as one from 256 on, in the order of the bytes.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_NAMES = [chr(byte if byte in PRINTABLE else 256 + HIDDEN.index(byte)) for byte in range(256)]


def deltas(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    stream = detokenizer(tokenizer)
    return [*(stream.add(token_id) for token_id in ids), stream.flush()]


def whole(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@KINDS
@given(ids=ANY_IDS)
@settings(max_examples=200, deadline=None)
def test_deltas_together_are_the_full_decode_of_any_ids(tokenizer, ids):
    assert "".join(deltas(tokenizer, ids)) == whole(tokenizer, ids)


@KINDS
@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_deltas_together_are_the_text_that_was_encoded(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(deltas(tokenizer, ids)) == whole(tokenizer, ids)


@KINDS
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_whole_and_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = deltas(tokenizer, ids)
    assert "".join(parts) == whole(tokenizer, ids)
    assert "".join(parts).lstrip(" ") == text.lstrip(" ")  # of two spaces in front, some keep one
    assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


@KINDS
@given(pieces=st.lists(st.sampled_from([b"\xf0\x9f\x98", b"\x80", b"\xff", b"\xe2\x82", b"\xac", b"a", b" "])))
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_text(tokenizer, pieces):
    names = BYTE_NAMES if tokenizer is byte_level() else BYTES
    ids = tokenizer.convert_tokens_to_ids([names[byte] for byte in b"".join(pieces)])
    assert "".join(deltas(tokenizer, ids)) == whole(tokenizer, ids)


@KINDS
def test_a_long_answer_is_sent_as_it_comes(tokenizer):
    """Many windows long; almost nothing is held back once the words are known."""
    text = "What is a block? And a slot? " * 40
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream, sent = detokenizer(tokenizer), ""
    for n, token_id in enumerate(ids, 1):
        sent += stream.add(token_id)
        assert sent == whole(tokenizer, ids[:n]).removesuffix("\ufffd")
    assert sent + stream.flush() == text


@KINDS
def test_special_tokens_are_silent_and_do_not_part_a_character(tokenizer):
    ids = tokenizer.encode("한", add_special_tokens=False)
    end = tokenizer.eos_token_id
    spread = [end, *(i for token_id in ids for i in (token_id, end))]
    assert "".join(deltas(tokenizer, spread)) == "한"
