"""The bundled model answers its example questions, and its training script works."""

import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatpage import tutor
from chatpage.tutor import texts, tokenizer
from chatpage.tutor.evaluate import Judge, Question, Tutor, card, exam, summary
from chatpage.tutor.train import Plan, answered, config, split_questions, train

corpus = texts.load()
judge = Judge(corpus)

RIGHT_TOPICS = {
    "What is a KV cache?": "kvcache",
    "Why does contiguous reservation waste memory?": "contiguous",
    "What is paged attention?": "paged",
    "What is a block table?": "blocktable",
    "How is the system prompt shared?": "system",
    "What is copy-on-write?": "cow",
    "What happens when memory is full?": "oom",
    "What does the panel show?": "panel",
    "How do I load a real model?": "loadmodel",
}


@pytest.fixture(scope="module")
def bundled() -> Tutor:
    return Tutor(tutor.path())


@pytest.mark.parametrize("with_system", [True, False], ids=["own system prompt", "no system prompt"])
def test_every_example_question_gets_an_answer_of_its_topic(bundled: Tutor, with_system: bool) -> None:
    system = [{"role": "system", "content": tutor.system_prompt()}] if with_system else []
    chats = [[*system, {"role": "user", "content": question}] for question in tutor.examples()]
    for question, (answer, ended) in zip(tutor.examples(), bundled.answers(chats), strict=True):
        graded = judge.grade(Question("example", system, question, RIGHT_TOPICS[question]), answer, ended)
        assert graded.right, f"{question} → {answer}"


def test_the_weights_are_small_and_of_the_architecture_that_the_script_trains() -> None:
    assert (tutor.path() / "model.safetensors").stat().st_size <= 4_000_000
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
    graded = [judge.grade(exam(corpus)[0], "?", False)]
    assert "Llama, 1,9" in card(tmp_path, corpus, summary(graded))


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


def test_the_learning_rate_rises_and_falls() -> None:
    plan = Plan(steps=1000, rows=1)
    assert plan.rate(0) == pytest.approx(0.01)
    assert plan.rate(100) == pytest.approx(1.0)
    assert plan.rate(999) == pytest.approx(0.05, abs=1e-4)


def test_the_judge_knows_its_sentences() -> None:
    for topic in corpus.subjects:
        assert judge.nearest(topic.answers[0])[0] == topic.id


def test_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys; from chatpage import tutor; tutor.path(), tutor.system_prompt(), tutor.examples();"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
