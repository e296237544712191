"""What a single token stands for: its text and its bytes."""

from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from chatpage.text.byte_level import spelt
from chatpage.text.detokenize import BYTE_TOKEN, REPLACEMENT, silent_ids


class TokenText(NamedTuple):
    """One token.

    Attributes:
        text: what it says; bytes that are no characters by themselves are written like `\\xf0`, as OpenAI does.
        raw: its bytes; those of all tokens of an answer are the answer's. None for a token that is never shown.
    """

    text: str
    raw: bytes | None


class TokenTexts:
    """The texts of a tokenizer's tokens, each as it is in the middle of a text: a leading space is part of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._silent = silent_ids(tokenizer)
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._offset = len(self._decode(self._before))
        self.of = lru_cache(maxsize=65_536)(self._of)

    def _of(self, token_id: int) -> TokenText:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # a padded vocabulary has ids without a token
            return TokenText("", None)
        if token_id in self._silent:
            return TokenText(token, None)
        raw = self._bytes(token_id, token)
        return TokenText(raw.decode(errors="backslashreplace"), raw)

    def _bytes(self, token_id: int, token: str) -> bytes:
        text = self._decode([*self._before, token_id])[self._offset :]
        if REPLACEMENT not in text:
            return text.encode()
        if BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        raw = spelt(token)
        return text.encode() if raw is None else raw

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # one sequence in, one text out
        return text
