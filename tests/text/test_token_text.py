"""The bytes of an answer's tokens are the answer's bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatpage.text.token_text import TokenTexts
from tests.text.samples import ALL_KINDS, BYTES, HARD_TEXTS, byte_fallback, byte_level

KINDS = pytest.mark.parametrize("tokenizer", [kind() for kind in ALL_KINDS], ids=[kind.__name__ for kind in ALL_KINDS])


@KINDS
@given(text=st.sampled_from(HARD_TEXTS) | st.text(max_size=30))
@settings(max_examples=150, deadline=None)
def test_the_bytes_of_all_tokens_are_those_of_the_text(tokenizer, text):
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    raw = b"".join(texts.of(token).raw or b"" for token in ids)
    decoded = tokenizer.decode(ids, skip_special_tokens=True).encode()
    # SentencePiece's decoders take a space away from the front of a text, not from its first token.
    assert raw in (decoded, b" " + decoded)
    if tokenizer is byte_level():
        assert raw == text.encode()


def test_a_byte_of_a_character_is_told_as_a_byte():
    for tokenizer, names in ((byte_level(), ["ð", "Ł"]), (byte_fallback(), [BYTES[0xF0], BYTES[0x9F]])):
        first, second = tokenizer.convert_tokens_to_ids(names)
        assert TokenTexts(tokenizer).of(first) == ("\\xf0", b"\xf0")
        assert TokenTexts(tokenizer).of(second) == ("\\x9f", b"\x9f")


def test_a_space_in_front_belongs_to_the_token():
    for tokenizer, name in ((byte_level(), "Ġa"), (byte_fallback(), "▁a")):
        assert TokenTexts(tokenizer).of(tokenizer.convert_tokens_to_ids(name)) == (" a", b" a")


@KINDS
def test_tokens_that_are_never_shown_have_no_bytes(tokenizer):
    texts = TokenTexts(tokenizer)
    assert texts.of(tokenizer.eos_token_id) == ("<|im_end|>", None)
    assert texts.of(len(tokenizer) + 5) == ("", None)


def test_the_replacement_character_itself():
    tokenizer = byte_level()
    ids = tokenizer.encode("\ufffd", add_special_tokens=False)
    assert b"".join(TokenTexts(tokenizer).of(token).raw or b"" for token in ids) == "\ufffd".encode()
