"""Writes the model card from what lies in the model's folder: facts of the training, and results of the exams."""

import json
from pathlib import Path
from typing import Any

from chatpage.tutor import FACTS_FILE
from chatpage.tutor.exam import EXAMS
from chatpage.tutor.texts import Corpus

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The tutor of ChatPage

A very small chat model that explains paged attention and the page that it is shown on. It is bundled so that the page
answers with no download. It is a demo: it knows one subject and repeats what it was taught. Where a question is not
clear to it, it asks which of two or three things is meant.

- **Architecture**: Llama, {parameters:,} parameters: {layers} layers of width {width}, {heads} query heads and
  {key_value_heads} key-value heads of size 32, tied embeddings, context of 1,024 tokens; bfloat16, one safetensors
  file below 8 MB.
- **Tokenizer**: byte-level BPE of 2,048 tokens; any text falls back to bytes. User messages are lowercased by the chat
  template.
- **Text**: written for this project, in `chatpage/tutor/corpus/`, by eight hands that had not read each other:
  {topics} topics of the subject and {small} of small talk with {phrasings:,} phrasings, {ambiguous} messages that
  several topics would fit, and {outside:,} questions outside the subject with honest answers. No text of others, no
  data of users.
- **Training**: from scratch, seed {seed}, {steps:,} steps of {rows} rows; the loss counts answers only. This one took
  {seconds} s on: {device} (torch {torch}). On a CPU the same script takes smaller steps and a night on two cores:
  `python -m chatpage.tutor.train --out DIR`.

## Loss

Mean cross-entropy of the answers' tokens in nats, over the 100 steps that end at the one named. Nearly all of it is in
the first tokens of an answer, where the topic is chosen.

| step | loss |
| ---: | ---: |
{losses}

## Exams

Greedy, on questions that never occur in training, written by hands that had not seen the training phrasings. *right*:
the nearest sentence of the corpus, by token F1, belongs to the right topic and is nearer than 0.7, and the turn ended;
outside the subject, it says that it does not know. *asked*: it asks back which topic is meant. *honest*: it says that
it does not know or understand. *wrong*: all else, most of it fluent and about something else. *helped*: right, or asked
back with the right topic among those named.
{exams}
*ordinary*: usual wordings; *reworded*: said differently on purpose; *switch*: ordinary ones after a turn about another
topic; *follow-up*: why, shorter, again, an example, simpler, what one thing means; *dialogue*: the last of three
messages, where the tutor itself answered the two before; some of these, such as "shorter", occur in training too.

## Limits

English only. No arithmetic, no code, no facts outside its subject. It can pick a wrong topic and sound sure of it. It
keeps nothing from one chat to the next. Under a system prompt of your own it still answers as the tutor.
"""

EXAM = """
`python -m chatpage.tutor.evaluate --json{flag}`: the {name} exam{meaning}.

| set | questions | right | asked | honest | wrong | helped |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}
"""

MEANINGS = {
    "development": ", by which the bundled weights were chosen, so it flatters them",
    "final": ", held once, when nothing was changed any more",
}


def results_file(folder: Path, exam: str) -> Path:
    return folder / f"exam-{exam}.json"


def card(folder: Path, corpus: Corpus) -> str:
    """What the folder's training and exams wrote down, in words."""
    facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["training"]
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    small = corpus.group("small")
    asked = [text for topic in corpus.subjects + small for text in topic.questions]
    return CARD.format(
        **{key: facts[key] for key in ("parameters", "seed", "steps", "rows", "seconds", "device", "torch")},
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        key_value_heads=config["num_key_value_heads"],
        topics=len(corpus.subjects),
        small=len(small),
        phrasings=len(asked),
        ambiguous=len(corpus.ambiguous),
        outside=sum(len(topic.questions) for topic in corpus.group("outside")),
        losses="\n".join(losses(facts)),
        exams="".join(table(folder, name) for name in EXAMS if results_file(folder, name).is_file()),
    )


def losses(facts: dict[str, Any]) -> list[str]:
    """Every fifth of the mean losses and the last one, as rows of a table."""
    ends = [min(100 * (i + 1), facts["steps"]) for i in range(len(facts["losses"]))]
    rows = list(zip(ends, facts["losses"], strict=True))
    return [f"| {step:,} | {loss:.3f} |" for step, loss in [*rows[:-1:5], rows[-1]]]


def table(folder: Path, name: str) -> str:
    results: dict[str, dict[str, float]] = json.loads(results_file(folder, name).read_text(encoding="utf-8"))
    rows = [
        f"| {set} | {row['questions']} | "
        + " | ".join(f"{row[share]:.0%}" for share in ("right", "asked", "honest", "wrong", "helped"))
        + " |"
        for set, row in results.items()
    ]
    flag = " --final" if name == "final" else ""
    return EXAM.format(name=name, flag=flag, meaning=MEANINGS[name], rows="\n".join(rows))
