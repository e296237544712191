"""Examines a trained tutor on questions that never occur in training: `python -m chatpage.tutor.evaluate --json`.

An answer counts as right if the nearest sentence of the corpus, by token F1, belongs to the right topic, is nearer than
0.7, and the turn ended. The sets: ordinary and reworded questions of the subject, ordinary ones after a turn about
something else, follow-ups, questions outside the subject, and small talk.
"""

import argparse
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from chatpage.tutor import FACTS_FILE, path, texts
from chatpage.tutor.lessons import Message
from chatpage.tutor.texts import FOLLOW_UPS, Corpus, Topic

NEAR = 0.7
MAX_TOKENS = 120
BATCH = 48


@dataclass(frozen=True, slots=True)
class Question:
    """One question of the exam, with what was said before it."""

    set: str
    history: list[Message]
    text: str
    topic: str
    """The right topic."""
    kind: str | None = None
    """Of a follow-up: why, short, again or example."""

    @property
    def messages(self) -> list[Message]:
        return [*self.history, {"role": "user", "content": self.text}]


@dataclass(frozen=True, slots=True)
class Graded:
    question: Question
    answer: str
    nearest: str
    """The topic of the nearest sentence of the corpus."""
    right: bool
    ended: bool


class Tutor:
    """A trained model on the CPU, answering greedily."""

    def __init__(self, folder: Path) -> None:
        self.coder: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(self, chats: list[list[Message]], max_tokens: int = MAX_TOKENS) -> list[tuple[str, bool]]:
        """For each chat the answer, and whether its turn was ended within `max_tokens`."""
        found: list[tuple[str, bool]] = []
        for start in range(0, len(chats), BATCH):
            found += self.batch(chats[start : start + BATCH], max_tokens)
        return found

    @torch.inference_mode()
    def batch(self, chats: list[list[Message]], max_tokens: int) -> list[tuple[str, bool]]:
        inputs: Any = self.coder.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        whole: Any = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
        written = whole[:, inputs["input_ids"].shape[1] :]
        ended = (written == self.coder.eos_token_id).any(dim=1).tolist()
        return list(zip(self.coder.batch_decode(written, skip_special_tokens=True), ended, strict=True))


class Judge:
    """Tells which topic an answer belongs to."""

    def __init__(self, corpus: Corpus) -> None:
        self.sentences: list[tuple[str, str, Counter[str]]] = []
        for topic in corpus.topics:
            kinds = {"answer": topic.answers, "why": topic.why, "short": topic.short, "example": topic.example}
            self.sentences += [
                (topic.id, kind, Counter(text.lower().split())) for kind, all in kinds.items() for text in all
            ]

    def nearest(self, answer: str) -> tuple[str, str, float]:
        """The topic and kind of the nearest sentence, and how near it is: token F1, 0…1."""
        words = Counter(answer.lower().split())
        topic, kind, sentence = max(self.sentences, key=lambda known: f1(words, known[2]))
        return topic, kind, f1(words, sentence)

    def grade(self, question: Question, answer: str, ended: bool) -> Graded:
        topic, kind, nearness = self.nearest(answer)
        wanted_kind = {None: kind, "again": "answer"}.get(question.kind, question.kind)
        right = ended and nearness > NEAR and topic == question.topic and kind == wanted_kind
        return Graded(question, answer, topic, right, ended)


def f1(a: Counter[str], b: Counter[str]) -> float:
    common = (a & b).total()
    return 2 * common / max(1, a.total() + b.total())


def exam(corpus: Corpus, seed: int = 7) -> list[Question]:
    """Every held-out phrasing once, the ordinary ones also after another topic; with the page's system prompt."""
    rng = random.Random(seed)
    system: list[Message] = [{"role": "system", "content": corpus.systems[0]}]
    questions: list[Question] = []
    for topic in corpus.subjects:
        questions += [Question("ordinary", system, text, topic.id) for text in topic.ordinary]
        questions += [Question("reworded", system, text, topic.id) for text in topic.reworded]
        other = rng.choice([one for one in corpus.subjects if one is not topic])
        questions += [Question("switch", system + turn(other), text, topic.id) for text in topic.ordinary]
    for kind in FOLLOW_UPS:
        for text in corpus.topic(kind).held_out:
            for topic in rng.sample(corpus.subjects, 3):
                questions.append(Question("follow-up", system + turn(topic), text, topic.id, kind))
    for topic in corpus.group("outside", "small"):
        name = "outside" if topic.group == "outside" else "small talk"
        questions += [Question(name, system, text, topic.id) for text in topic.held_out]
    return questions


def turn(topic: Topic) -> list[Message]:
    return [{"role": "user", "content": topic.questions[0]}, {"role": "assistant", "content": topic.answers[0]}]


def examine(folder: Path, corpus: Corpus) -> list[Graded]:
    questions = exam(corpus)
    judge, answers = Judge(corpus), Tutor(folder).answers([question.messages for question in questions])
    return [judge.grade(question, *answer) for question, answer in zip(questions, answers, strict=True)]


def summary(graded: list[Graded]) -> dict[str, dict[str, float]]:
    """For each set: how many were asked, the share that was right, and the share that ended its turn."""
    sets: dict[str, list[Graded]] = {}
    for one in graded:
        sets.setdefault(one.question.set, []).append(one)
    return {
        name: {
            "asked": len(all),
            "right": round(sum(one.right for one in all) / len(all), 3),
            "ended": round(sum(one.ended for one in all) / len(all), 3),
        }
        for name, all in sets.items()
    }


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The tutor of ChatPage

A very small chat model that explains paged attention and the page that it is shown on. It is bundled so that the page
answers with no download. It is a demo: it knows one subject and repeats what it was taught.

- **Architecture**: Llama, {parameters:,} parameters: 4 layers of width 192, 6 query heads and 2 key-value heads of size
  32, tied embeddings, context of 1,024 tokens; bfloat16, one safetensors file below 4 MB.
- **Tokenizer**: byte-level BPE of 2,048 tokens; any text falls back to bytes. User messages are lowercased by the chat
  template.
- **Text**: written for this project, in `chatpage/tutor/corpus/`: {topics} topics of the subject and {small} of small
  talk with {phrasings:,} phrasings, and questions outside the subject with honest answers. No text of others, no data
  of users.
- **Training**: `python -m chatpage.tutor.train --out DIR`, from scratch, seed {seed}, {steps:,} steps of about 65,000
  tokens on a GPU; the loss counts answers only. This one took {seconds} s on: {device} (torch {torch}). On a CPU the
  same script takes smaller steps and some hours on two cores.

## Loss

Mean cross-entropy of the answers' tokens in nats, over the 100 steps that end at the one named. Nearly all of it is in
the first token of an answer, where the topic is chosen.

| step | loss |
| ---: | ---: |
{losses}

## Exam

`python -m chatpage.tutor.evaluate --json`, greedy, on phrasings that never occur in training. Right: the nearest
sentence of the corpus, by token F1, belongs to the right topic and is nearer than 0.7, and the turn ended.

| set | asked | right | turn ended |
| --- | ---: | ---: | ---: |
{exam}

*ordinary*: usual wordings; *reworded*: said differently on purpose; *switch*: ordinary ones after a turn about another
topic; *follow-up*: why, shorter, again, an example. The authors of the texts wrote the exam as well, and the bundled
weights were chosen by it from five runs that differ in recipe and length; so it flatters them, and visitors will see
less.

## Limits

English only. No arithmetic, no code, no facts outside its subject. It can pick a wrong topic and sound sure of it. It
keeps nothing from one chat to the next. Under a system prompt of your own it still answers as the tutor.
"""


def card(folder: Path, corpus: Corpus, results: dict[str, dict[str, float]]) -> str:
    """The model card: what the training wrote down, and these results."""
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["training"]
    small = corpus.group("small")
    ends = [min(100 * (i + 1), facts["steps"]) for i in range(len(facts["losses"]))]
    shown = [pair for i, pair in enumerate(zip(ends, facts["losses"], strict=True)) if i % 4 == 0 or i == len(ends) - 1]
    return CARD.format(
        **{key: facts[key] for key in ("parameters", "seed", "steps", "seconds", "device", "torch")},
        topics=len(corpus.subjects),
        small=len(small),
        phrasings=sum(len(topic.questions) for topic in corpus.subjects + small),
        losses="\n".join(f"| {step:,} | {loss:.3f} |" for step, loss in shown),
        exam="\n".join(
            f"| {name} | {row['asked']} | {row['right']:.0%} | {row['ended']:.0%} |" for name, row in results.items()
        ),
    )


def listing(graded: list[Graded]) -> str:
    """All answers, the wrong ones first."""
    return "\n".join(
        f"{'right' if one.right else 'WRONG'}  {one.question.set}  {one.question.topic}"
        f"{f' ({one.question.kind})' if one.question.kind else ''} → {one.nearest}\n"
        f"  {one.question.text}\n  {one.answer}"
        for one in sorted(graded, key=lambda one: one.right)
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chatpage.tutor.evaluate", description="Examine the bundled model.")
    parser.add_argument("--model", type=Path, default=path(), help="the folder of the model (default: the bundled one)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--answers", type=Path, help="write all questions and answers to this file")
    parser.add_argument("--card", action="store_true", help="write the model card into the model's folder")
    given = parser.parse_args()
    corpus = texts.load()
    graded = examine(given.model, corpus)
    results = summary(graded)
    if given.answers:
        given.answers.write_text(listing(graded) + "\n", encoding="utf-8")
    if given.card:
        (given.model / "README.md").write_text(card(given.model, corpus, results), encoding="utf-8")
    if given.json:
        print(json.dumps(results, indent=1))
    else:
        for name, row in results.items():
            print(f"{name:10}  asked {row['asked']:4}  right {row['right']:4.0%}  ended {row['ended']:4.0%}")


if __name__ == "__main__":
    main()
