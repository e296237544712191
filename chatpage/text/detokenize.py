"""Token ids to text, one at a time, never half a character.

What `add` and `flush` return, put together, is what decoding all ids at once gives without special tokens.
"""

import re
from codecs import utf_8_decode
from collections.abc import Callable
from enum import Enum
from functools import cache, lru_cache
from typing import Protocol, cast

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from chatpage.text.byte_level import bytes_of

# A byte-fallback tokenizer decodes a run of these as one piece: whether its bytes are text is known when the run ends.
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\ufffd"
LONGEST_WINDOW = 12
KEPT_WINDOW = 4
MOST_KEPT = 65_536  # tokens whose text is known


class Detokenizer(Protocol):
    """The text of one answer, as far as it is certain."""

    def add(self, token_id: int) -> str:
        """The text that this token makes certain, often empty."""
        ...

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        ...


def detokenizer(tokenizer: PreTrainedTokenizerBase) -> Detokenizer:
    """One for a new answer."""
    core = _core(tokenizer)
    return OfBytes(tokenizer) if core and isinstance(core.decoder, ByteLevel) else OfWindows(tokenizer)


class OfBytes:
    """For byte-level tokens: their bytes add up, and those of half a character wait for the rest of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._go_on = _from_bytes(tokenizer)
        self._half = b""

    def add(self, token_id: int) -> str:
        text, self._half = self._go_on(self._half, token_id)
        return text

    def flush(self) -> str:
        rest, self._half = self._half, b""
        return rest.decode(errors="replace")


@lru_cache(maxsize=8)
def _from_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[bytes, int], tuple[str, bytes]]:
    """What half a character and the next token are together: text, and half a character again."""
    silent = silent_ids(tokenizer)

    @lru_cache(maxsize=MOST_KEPT)
    def go_on(half: bytes, token_id: int) -> tuple[str, bytes]:
        held = half if token_id in silent else half + bytes_of(tokenizer, token_id)
        text, used = utf_8_decode(held, "replace")
        return text, held[used:]

    return go_on


class Role(Enum):
    """What a token does in a text."""

    SILENT = 0  # it is never shown
    BYTE = 1
    TEXT = 2


class OfWindows:
    """For all others: a token's text depends on those before it (a leading space, the rest of a character).

    A window of the last tokens is decoded again with every new one, and what was sent of it is left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._role = _roles(tokenizer)
        self._decode = _decoder(tokenizer)
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text

    def add(self, token_id: int) -> str:
        role = self._role(token_id)
        if role is Role.SILENT:
            return ""
        self._window.append(token_id)
        if role is Role.BYTE:
            return ""
        text = self._decode(self._window)
        # The last sign may be a character of which some bytes are still to come.
        certain = len(text) - text.endswith(REPLACEMENT)
        new = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if len(self._window) > LONGEST_WINDOW:
            self._shorten()
        return new

    def flush(self) -> str:
        rest = self._decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return rest

    def _shorten(self) -> None:
        """Forget all but the last tokens; they must have text, or the next one would be taken for the first."""
        window = self._window[-KEPT_WINDOW:]
        text = self._decode(window)
        if text:
            self._window, self._sent = window, len(text) - text.endswith(REPLACEMENT)


def _core(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What decodes ids just as transformers does, without what that does around it for every call."""
    is_fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    is_plain = is_fast and type(tokenizer)._decode is PreTrainedTokenizerFast._decode
    return cast(Tokenizer, tokenizer.backend_tokenizer) if is_plain else None


@lru_cache(maxsize=8)
def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Ids to text without special tokens."""
    core = _core(tokenizer)
    if core:
        return core.decode

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # one sequence in, one text out
        return text

    return decode


@lru_cache(maxsize=8)
def _roles(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], Role]:
    """The role of each of a tokenizer's tokens."""
    silent = silent_ids(tokenizer)

    @cache
    def role(token_id: int) -> Role:
        token = tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str) or token_id in silent:  # None: a padded vocabulary has ids without a token
            return Role.SILENT
        return Role.BYTE if BYTE_TOKEN.fullmatch(token) else Role.TEXT

    return role


@lru_cache(maxsize=8)
def silent_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens, which are never shown."""
    flagged = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(flagged.union(tokenizer.all_special_ids))
