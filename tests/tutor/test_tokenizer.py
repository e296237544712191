"""The tokenizer and the chat template of the bundled model, as `transformers` loads them from its folder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from chatpage import tutor
from chatpage.tutor import texts, tokenizer
from chatpage.tutor.lessons import Teacher

coder = AutoTokenizer.from_pretrained(tutor.path())
texts_of_users = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text)


def ids(messages, *, generate: bool = False) -> list[int]:
    return coder.apply_chat_template(messages, add_generation_prompt=generate, tokenize=True, return_dict=False)


@given(texts_of_users)
def test_any_text_comes_back(text: str) -> None:
    encoded = coder.encode(text, add_special_tokens=False)
    assert coder.decode(encoded) == text


def test_special_tokens() -> None:
    assert coder.convert_tokens_to_ids(tokenizer.SPECIAL_TOKENS) == list(range(5))
    assert (coder.eos_token_id, coder.pad_token_id, coder.bos_token_id) == (tokenizer.END, tokenizer.PAD, None)
    assert len(coder) == tokenizer.VOCAB_SIZE
    assert coder.encode("hi") == coder.encode("hi", add_special_tokens=False)


def test_the_template_says_what_training_saw() -> None:
    teacher = Teacher(texts.load(), seed=5)
    for _ in range(50):
        messages = teacher.conversation(3)
        assert coder.apply_chat_template(messages, tokenize=False) == tokenizer.render(messages)


@given(st.lists(st.tuples(texts_of_users, texts_of_users), min_size=1, max_size=4), st.booleans())
def test_a_chat_that_goes_on_begins_with_its_past(turns: list[tuple[str, str]], with_system: bool) -> None:
    messages = [{"role": "system", "content": tutor.system_prompt()}] if with_system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        asked = ids(messages, generate=True)
        messages.append({"role": "assistant", "content": answer})
        ended = ids(messages)
        assert ended[: len(asked)] == asked
        assert ended[-1] == coder.eos_token_id
        more = ids([*messages, {"role": "user", "content": "why?"}], generate=True)
        assert more[: len(ended)] == ended


def test_case_of_the_user_does_not_matter() -> None:
    assert ids([{"role": "user", "content": " What is a KV cache?"}]) == ids(
        [{"role": "user", "content": "what is a kv cache?"}]
    )


@pytest.mark.parametrize("roles", [["tool"], ["user", "system"]])
def test_other_roles_are_refused(roles: list[str]) -> None:
    with pytest.raises(Exception, match="A chat is made of user and assistant messages"):
        ids([{"role": role, "content": "x"} for role in roles])


def test_the_system_prompt_ends_inside_a_block() -> None:
    def chat(question: str) -> list[int]:
        system = {"role": "system", "content": tutor.system_prompt()}
        return ids([system, {"role": "user", "content": question}], generate=True)

    one, other = chat("x"), chat("?")
    shared = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert 60 <= len(coder.encode(tutor.system_prompt())) <= 110
    assert 60 <= shared <= 110
    assert shared % 16 != 0


def test_the_folder_holds_the_tokenizer_that_the_corpus_gives() -> None:
    made = tokenizer.train(texts.load(), max_length=1024)
    assert made.get_vocab() == coder.get_vocab()
    assert made.chat_template == coder.chat_template
    assert texts.load().systems[0] == tutor.system_prompt()
