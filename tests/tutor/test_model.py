"""The bundled model answers the questions that the page offers, and its training script works."""

import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatpage import tutor
from chatpage.tutor import texts, tokenizer
from chatpage.tutor.card import card
from chatpage.tutor.evaluate import Examiner, Tutor
from chatpage.tutor.exam import Question
from chatpage.tutor.train import Plan, answered, config, make_rows, split_questions, train

corpus = texts.load()
examiner = Examiner(corpus)
SYSTEM = {"role": "system", "content": tutor.system_prompt()}


@pytest.fixture(scope="module")
def bundled() -> Tutor:
    return Tutor(tutor.path())


def wrong(tutor: Tutor, questions: dict[str, str], history: list[dict[str, str]]) -> list[str]:
    """Those of the questions that get no answer of their topic, each with its answer."""
    chats = [[*history, {"role": "user", "content": text}] for text in questions]
    graded = [
        examiner.grade(Question("offered", text, topic), *answer)
        for (text, topic), answer in zip(questions.items(), tutor.answers(chats), strict=True)
    ]
    return [f"{one.question.text} → {one.answer}" for one in graded if one.grade != "right"]


@pytest.mark.parametrize("history", [[SYSTEM], []], ids=["own system prompt", "no system prompt"])
def test_every_example_question_gets_an_answer_of_its_topic(bundled: Tutor, history: list[dict[str, str]]) -> None:
    owners = {topic.question: topic.id for topic in corpus.subjects}
    assert not wrong(bundled, {question: owners[question] for question in tutor.examples()}, history)


def test_every_suggested_question_gets_an_answer_of_its_topic(bundled: Tutor) -> None:
    assert not wrong(bundled, {topic.question: topic.id for topic in corpus.subjects}, [SYSTEM])


def test_a_question_that_is_not_clear_is_asked_back(bundled: Tutor) -> None:
    chats = [
        [SYSTEM, {"role": "user", "content": text}] for text in ("copied", "settings", "phases", "pieces", "arrows")
    ]
    for chat, (answer, ended) in zip(chats, bundled.answers(chats), strict=True):
        options = examiner.judge.options(answer)
        assert ended
        assert set(options) == set(corpus.ambiguous[chat[-1]["content"]])
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "the second one"}]
    for chat, (answer, _) in zip(chats, bundled.answers(chats), strict=True):
        _, second, *_ = examiner.judge.options(chat[-2]["content"])
        assert examiner.judge.nearest(answer).topic == second


def test_the_weights_are_small_and_of_the_architecture_that_the_script_trains() -> None:
    assert (tutor.path() / "model.safetensors").stat().st_size <= 8_000_000
    loaded = AutoModelForCausalLM.from_pretrained(tutor.path()).config
    wanted = config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(loaded, name) == getattr(wanted, name)
    assert loaded.eos_token_id == wanted.eos_token_id


def test_three_steps_write_a_folder_that_loads(tmp_path) -> None:
    train(tmp_path, Plan(steps=3, rows=4, lessons=12), torch.device("cpu"))
    coder = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = coder.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=2)
    assert written.shape[1] <= inputs["input_ids"].shape[1] + 2
    assert "Llama, 3,541,248 parameters" in card(tmp_path, corpus)


def test_loss_counts_answers_and_their_ends_only() -> None:
    coder = AutoTokenizer.from_pretrained(tutor.path())
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "Bye!"},
    ]
    tokens = coder.apply_chat_template(chat, return_tensors="np", return_dict=True)["input_ids"]
    assert coder.decode(tokens[0][answered(tokens)[0]]) == "Because.<|end|>Bye!<|end|>"


def test_split_questions_spell_the_same_text() -> None:
    coder = AutoTokenizer.from_pretrained(tutor.path())
    chat = [{"role": "user", "content": "what is a block table"}, {"role": "assistant", "content": "A block table"}]
    ids = coder.apply_chat_template(chat, return_dict=False)
    split = split_questions(ids, tokenizer.parts(coder), 1.0, random.Random(0))
    assert coder.decode(split) == coder.decode(ids)
    assert split.index(tokenizer.END) > ids.index(tokenizer.END)
    assert split[split.index(tokenizer.ASSISTANT) :] == ids[ids.index(tokenizer.ASSISTANT) :]


def test_rows_are_the_same_on_any_number_of_cores(monkeypatch) -> None:
    coder, plan = tokenizer.train(corpus, 1024), Plan(steps=1, rows=1)
    monkeypatch.setattr("chatpage.tutor.train.SHARE", 4)
    rows = make_rows(coder, plan, 10, 256).tokens
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert rows.equal(make_rows(coder, plan, 10, 256).tokens)
    assert len({tuple(row) for row in rows.tolist()}) == 10


def test_the_learning_rate_rises_and_falls() -> None:
    plan = Plan(steps=1000, rows=1)
    assert plan.rate(0) == pytest.approx(0.01)
    assert plan.rate(100) == pytest.approx(1.0)
    assert plan.rate(999) == pytest.approx(0.05, abs=1e-4)


def test_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys; from chatpage import tutor; tutor.system_prompt(), tutor.suggestions('Hello!');"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
