"""Small tokenizers of the kinds that models come with, made on the spot."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LINES = [
    "A block table says where in the pool the keys and values of a sequence are.",
    "You are a kind assistant, and you answer in short sentences.",
    "What is a block? And a slot? Two and two is four; I think.",
    "สวัสดี ภาษาไทย 한국어 글자 नमस्ते हिन्दी naïve café",
]
# Text that breaks careless decoders: joined emoji, scripts without spaces, combining signs, spaces at either end.
HARD_TEXTS = [
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👍🏽!",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "한국어는 음절 글자를 씁니다. 각",
    "क्षत्रिय ज्ञान हिन्दी में लिखा है",
    "  two spaces first, two last  ",
    "a\n\n\tb \u200d \ufffd c\x00d",
    "é is not é; ﷽ ẞ İ",
    "🧑‍🦽‍➡️🏴󠁧󠁢󠁷󠁬󠁳󠁿👨🏿‍🤝‍👨🏻 3️⃣",
    "ก็เป็นน้ำ ญี่ปุ่น ฤๅษี",
    "ㄱㅏ 가 각 값 꿹 한",
    "स्त्री क़ श्रृंखला र्‍य",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(LINES * 3, trainer)
    return _wrap(core)


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE, as in Llama 2: a space before the text, bytes for a character that it does not know."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *SPECIAL, *BYTES], limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(LINES[:3] * 3, trainer)

    # The trainer's byte tokens are special tokens; what a model comes with has them as ordinary ones.
    merges = [(first, second) for first, second in json.loads(trained.to_str())["model"]["merges"]]
    model = models.BPE(vocab=trained.get_vocab(), merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    core = Tokenizer(model)
    core.normalizer = spaces
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return _wrap(core)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece-like unigrams with bytes, as in T5's and XGLM's kin: the decoder takes the first space away."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(LINES * 3, trainer)
    pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    pieces[len(SPECIAL) + 1 : len(SPECIAL) + 1] = [(byte, -20.0) for byte in BYTES]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return _wrap(core)


ALL_KINDS = [byte_level, byte_fallback, metaspace]


def _wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
