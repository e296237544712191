"""The tutor's tokenizer and chat template.

A byte-level BPE: every byte has a token of its own, so that any text falls back to bytes and comes back unchanged.
Digits stand alone. The five special tokens frame the turns of a chat, and nothing else is put around a text:

    <|system|> {system prompt}<|end|><|user|> {question, in lower case}<|end|><|assistant|>{answer}<|end|>

The space after `<|user|>` lets the first word of a question be the same token as in its middle. A turn begins and ends
with a special token, so the tokens of a chat are always a prefix of the tokens of the chat that goes on.
"""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chatpage.tutor.judge import ask_back
from chatpage.tutor.texts import Corpus

PAD, END, SYSTEM, USER, ASSISTANT = range(5)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 2048

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {{- '<|system|> ' + message['content'] | trim + '<|end|>' -}}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user|> ' + message['content'] | trim | lower + '<|end|>' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<|assistant|>' + message['content'] + '<|end|>' -}}
  {%- else -%}
    {{- raise_exception('A chat is made of user and assistant messages, after at most one system message.') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""


def render(messages: list[dict[str, str]]) -> str:
    """What the chat template makes of messages, without the cost of the template; a test compares the two."""
    parts: list[str] = []
    for message in messages:
        text = message["content"]
        if message["role"] == "user":
            parts.append(f"<|user|> {text.strip().lower()}<|end|>")
        elif message["role"] == "assistant":
            parts.append(f"<|assistant|>{text}<|end|>")
        else:
            parts.append(f"<|system|> {text.strip()}<|end|>")
    return "".join(parts)


def train(corpus: Corpus, max_length: int) -> PreTrainedTokenizerFast:
    """A new tokenizer for the texts of a corpus; `max_length` is the model's context in tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=CHAT_TEMPLATE,
        eos_token=SPECIAL_TOKENS[END],
        pad_token=SPECIAL_TOKENS[PAD],
        additional_special_tokens=SPECIAL_TOKENS[SYSTEM:],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def parts(coder: PreTrainedTokenizerFast) -> dict[int, list[int]]:
    """For each token that was merged from two others: the ids of those."""
    vocabulary = coder.get_vocab()
    merges = json.loads(coder.backend_tokenizer.to_str())["model"]["merges"]
    return {vocabulary[left + right]: [vocabulary[left], vocabulary[right]] for left, right in merges}


def texts(corpus: Corpus) -> Iterable[str]:
    """What the tokenizer learns its pieces from: answers as written, questions as the template shows them."""
    for topic in corpus.topics.values():
        for answers in topic.sentences.values():
            yield from answers * 3
        if topic.names:
            yield from [ask_back([topic, topic])] * 3
        for question in topic.questions:
            yield f" {question}"
        for combination in topic.combinations:
            for phrase in (*combination.patterns, *combination.subjects):
                yield f" {phrase}"
    for system in corpus.systems:
        yield f" {system}"
