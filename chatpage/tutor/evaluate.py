"""Examines a trained tutor on questions that never occur in training: `python -m chatpage.tutor.evaluate --json`.

Each answer gets one of four grades:

    right   the nearest sentence of the corpus, by token F1, belongs to the right topic, is near, and the turn ended;
            outside the subject: the tutor says that it does not know
    asked   the tutor asks back which of some topics is meant
    honest  it says that it does not know or understand
    wrong   anything else: fluent and about something else, or not fluent

The development exam is for choosing between models; the final one is only held with `--final`, once, at the end.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from chatpage.tutor import path, texts
from chatpage.tutor.card import card, results_file
from chatpage.tutor.exam import Message, Question, exam
from chatpage.tutor.judge import NEAR, Judge
from chatpage.tutor.texts import Corpus

MAX_TOKENS = 120
BATCH = 48
GRADES = ("right", "asked", "honest", "wrong")
HONEST_TOPICS = ("outside", "maths", "unclear", "nothing")


@dataclass(frozen=True, slots=True)
class Graded:
    question: Question
    answer: str
    grade: str
    """One of GRADES."""
    nearest: str
    """The topic of the nearest sentence of the corpus."""
    options: list[str]
    """The topics that the answer asks between."""
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


class Examiner:
    """Grades answers by the corpus."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.judge = corpus, Judge(corpus.topics.values())

    def grade(self, question: Question, answer: str, ended: bool) -> Graded:
        nearest, options = self.judge.nearest(answer), self.judge.options(answer)
        known = ended and nearest.nearness > NEAR
        if options and ended:
            grade = "asked"
        elif known and self.belongs(nearest.topic, nearest.kind, question) and not repeats(answer, question):
            grade = "right"
        elif known and nearest.topic in HONEST_TOPICS:
            grade = "honest"
        else:
            grade = "wrong"
        return Graded(question, answer, grade, nearest.topic, options, ended)

    def belongs(self, topic: str, kind: str, question: Question) -> bool:
        """Whether a sentence is what the question wants."""
        if question.set == "outside":
            return self.corpus.topics[topic].group == "outside"
        kinds = {"again": {"answer", "simple"}}.get(question.kind or "", {question.kind})
        return topic == question.topic and (question.kind in (None, "more", "meaning") or kind in kinds)


def repeats(answer: str, question: Question) -> bool:
    """Whether a follow-up got what stands above it already."""
    return question.kind is not None and any(answer == message["content"] for message in question.history)


def examine(tutor: Tutor, corpus: Corpus, name: str) -> list[Graded]:
    questions = exam(corpus, name)
    chats = [[*question.history] for question in questions]
    for turn in range(max(len(question.before) for question in questions)):
        talking = [chat for chat, question in zip(chats, questions, strict=True) if turn < len(question.before)]
        messages = [question.before[turn] for question in questions if turn < len(question.before)]
        for chat, message in zip(talking, messages, strict=True):
            chat.append({"role": "user", "content": message})
        for chat, (answer, _) in zip(talking, tutor.answers(talking), strict=True):
            chat.append({"role": "assistant", "content": answer})
    for chat, question in zip(chats, questions, strict=True):
        chat.append({"role": "user", "content": question.text})
    examiner = Examiner(corpus)
    return [examiner.grade(question, *answer) for question, answer in zip(questions, tutor.answers(chats), strict=True)]


def summary(graded: list[Graded]) -> dict[str, dict[str, float]]:
    """For each set how many questions it has, and the shares of the grades.

    `helped` are those answered right or asked back with the right topic among the options.
    """
    sets: dict[str, list[Graded]] = {}
    for one in graded:
        sets.setdefault(one.question.set, []).append(one)
    return {name: {"questions": len(all), **shares(all)} for name, all in sets.items()}


def shares(graded: list[Graded]) -> dict[str, float]:
    counts = Counter(one.grade for one in graded)
    helped = counts["right"] + sum(one.question.topic in one.options for one in graded)
    ended = sum(one.ended for one in graded)
    return {
        name: round(count / len(graded), 3)
        for name, count in (*((grade, counts[grade]) for grade in GRADES), ("helped", helped), ("ended", ended))
    }


def listing(graded: list[Graded]) -> str:
    """All answers, the wrong ones first."""
    return "\n".join(
        f"{one.grade:6} {one.question.set}  {one.question.topic}"
        f"{f' ({one.question.kind})' if one.question.kind else ''} → {', '.join(one.options) or one.nearest}\n"
        f"  {' => '.join([*one.question.before, one.question.text])}\n  {one.answer}"
        for one in sorted(graded, key=lambda one: -GRADES.index(one.grade))
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chatpage.tutor.evaluate", description="Examine the bundled model.")
    parser.add_argument("--model", type=Path, default=path(), help="the folder of the model (default: the bundled one)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--answers", type=Path, help="write all questions and answers to this file")
    parser.add_argument("--card", action="store_true", help="keep the results and write the card in the model's folder")
    parser.add_argument("--final", action="store_true", help="hold the final exam: once, at the end")
    given = parser.parse_args()
    corpus = texts.load()
    name = "final" if given.final else "development"
    graded = examine(Tutor(given.model), corpus, name)
    results = summary(graded)
    if given.answers:
        given.answers.write_text(listing(graded) + "\n", encoding="utf-8")
    if given.card:
        results_file(given.model, name).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (given.model / "README.md").write_text(card(given.model, corpus), encoding="utf-8")
    if given.json:
        print(json.dumps(results, indent=1))
    else:
        for set, row in results.items():
            asked = row.pop("questions")
            print(f"{set:11}{asked:4}", *(f"{name} {share:4.0%}" for name, share in row.items()), sep="  ")


if __name__ == "__main__":
    main()
