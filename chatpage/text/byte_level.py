"""Byte-level BPE, as GPT-2, Llama 3 and Qwen have it: every token is spelt in letters that stand for bytes."""

from transformers import PreTrainedTokenizerBase


def _alphabet() -> dict[str, int]:
    """The byte of each letter.

    A byte that is a visible character of Latin-1 is that character; the others are, in their order, those from 256 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _alphabet()


def spelt(token: str) -> bytes | None:
    """The bytes of a token; None where it has letters that stand for none, as an added token may."""
    if all(letter in BYTE_OF for letter in token):
        return bytes(BYTE_OF[letter] for letter in token)
    return None


def bytes_of(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """What a token that is not special adds to a text, with a tokenizer of this kind."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if not isinstance(token, str):  # a padded vocabulary has ids without a token
        return b""
    raw = spelt(token)
    return token.encode() if raw is None else raw
