"""Blocks in use where sequences share: beside the fewest that will do, no sharing, and contiguous reservations.

    python -m benchmarks.sharing            a table
    python -m benchmarks.sharing --json     one line a row

The bundled model on a CPU; 12 requests at once, or sessions behind one system prompt. After every step the blocks that
running sequences hold are counted, and compared with the fewest that could hold the same tokens: that number is worked
out from the tokens alone. What two replies draw each for itself counts as different, even if it is the same word.
Savings are of all blocks of all steps. A reservation takes, for each reply or beam, the slots of prompt and answer (its
length, which nobody knows before the end) or of the whole context.

Lengths are drawn from exponential distributions with the means of Alpaca and ShareGPT in the vLLM paper (Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023, figure 11); the savings of its
section 6.3 stand beside ours. Its requests, its model and its block size of 16 are not ours, but for the last.
"""

import argparse
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

from benchmarks.report import Table, header, show_header
from chatpage.core import Core
from chatpage.schedule.beam import Beams
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt, Request
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session
from chatpage.settings import Settings
from chatpage.stream import Stream
from chatpage.tutor import texts

REQUESTS = 12
SESSIONS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 1024
QUESTION, ANSWER = 20, 60  # tokens of a session behind a system prompt

Tokens = tuple[int, ...]


class Lengths(NamedTuple):
    """Mean tokens of prompt and answer, and the savings that the paper names, for 2 to 6 replies or beams."""

    name: str
    prompt: float
    answer: float
    replies: str
    beams: str


ALPACA = Lengths("Alpaca", 19.31, 58.45, "6.1 to 9.8 %", "37.6 to 55.2 %")
SHARE_GPT = Lengths("ShareGPT", 161.31, 337.99, "16.2 to 30.5 %", "44.3 to 66.3 %")


def fewest_blocks(sequences: Collection[Tokens], size: int) -> int:
    """Blocks of `size` slots that hold these sequences, if what begins alike is stored once, up to where it parts."""
    count = 0
    for start in range(0, max(map(len, sequences), default=0), size):
        beginnings = sorted({tokens[: start + size] for tokens in sequences if len(tokens) > start})
        count += sum(following[: len(own)] != own for own, following in pairwise([*beginnings, ()]))
    return count


@dataclass(frozen=True, slots=True)
class Use:
    """Blocks after one step."""

    ours: int
    fewest: int
    unshared: int
    of_its_length: float
    of_the_context: float


class Desk:
    """A core without a thread, and what is asked of it."""

    def __init__(self) -> None:
        self.core = Core(
            Settings(device="cpu", dtype="float32", sharing="system", kv_blocks=8192, max_sequences=128),
            lambda detail: None,
        )
        self.size = self.core.pool.block_size
        self._text = self._read()
        self._sessions = 0
        self.begin()

    def begin(self) -> None:
        """The same requests again."""
        self._random = Random(1)

    def _read(self) -> Tokens:
        answers = [answer for topic in texts.load().subjects for answer in topic.answers]
        return tuple(self.core.tokenizer.encode(" ".join(answers), add_special_tokens=False))

    def prompt(self, length: int) -> Tokens:
        start = self._random.randrange(len(self._text) - length)
        return self._text[start : start + length]

    def length(self, mean: float) -> int:
        """At most what two fit of into the context."""
        return max(4, min(round(self._random.expovariate(1 / mean)), CONTEXT // 2 - 1))

    def ask(self, prompt: Prompt, answer: int, replies: int, beams: Beams | None = None) -> None:
        """Ask for answers of exactly so many tokens, in a domain of its own."""
        self._sessions += 1
        session = Session(self._sessions, self._sessions, keeps=False)
        heat = 0.0 if beams else 1.0
        params = SamplingParams(temperature=heat, seed=self._sessions, min_tokens=answer, max_tokens=answer)
        streams = [Stream(lambda: None) for _ in range(replies)]
        self.core.submit(Request(prompt, params, beams=beams), session, *streams)

    def uses(self, pinned: Tokens = ()) -> Iterator[Use]:
        """Run to the end. With `pinned` the blocks of that system prompt count too."""
        while self.core.has_work:
            self.core.step()
            live = [s for s in self.core.scheduler.running if s.table.length]
            if live:
                held = {block for s in live for block in s.table.blocks} | (self.core.pool.pinned if pinned else set())
                stored = [self._stored(sequence) for sequence in live]
                yield Use(
                    ours=len(held),
                    fewest=self._fewest([s.session.id for s in live], stored, pinned),
                    unshared=sum(len(s.table.blocks) for s in live),
                    of_its_length=sum(s.limit or 0 for s in live) / self.size,
                    of_the_context=len(live) * CONTEXT / self.size,
                )

    def _stored(self, sequence: Sequence) -> Tokens:
        """The tokens in its table. What it shares with nobody, whatever it says, has numbers that no other has."""
        tokens, system = tuple(sequence.tokens[: sequence.table.length]), sequence.system_tokens
        common = len(tokens) if sequence.candidates else min(len(tokens), system or sequence.prompt_length)
        first = (1 + sequence.id) * self.core.loaded.vocab_size
        return (*tokens[:common], *(first + token for token in tokens[common:]))

    def _fewest(self, owners: list[int], stored: list[Tokens], pinned: Tokens) -> int:
        """Requests share nothing but a system prompt, which stays as it is: its last block can hold nothing more."""
        if pinned:
            end = (-1,) if len(pinned) % self.size else ()  # a token that nobody has
            return fewest_blocks([(*pinned, *end), *stored], self.size)
        own = {owner: [s for o, s in zip(owners, stored, strict=True) if o == owner] for owner in owners}
        return sum(fewest_blocks(sequences, self.size) for sequences in own.values())


def several(desk: Desk, lengths: Lengths, count: int, *, search: bool) -> dict[str, Any]:
    """Requests for several replies, or with a beam search."""
    desk.begin()
    for _ in range(REQUESTS):
        beams = Beams(count) if search else None
        prompt, answer = Prompt(desk.prompt(desk.length(lengths.prompt))), desk.length(lengths.answer)
        desk.ask(prompt, answer, 1 if search else count, beams)
    what = f"{count} beams" if search else f"{count} replies"
    paper = lengths.beams if search else lengths.replies
    return {"what": what, "lengths": lengths.name, **summary(list(desk.uses())), "paper, 2 to 6": paper}


def behind_a_system_prompt(desk: Desk, sessions: int) -> dict[str, Any]:
    desk.begin()
    system = desk.core.systems[0].tokens
    for _ in range(sessions):
        desk.ask(Prompt((*system, *desk.prompt(QUESTION)), len(system)), ANSWER, 1)
    what = f"{sessions} session{'s' * (sessions > 1)} behind {len(system)} tokens"
    return {"what": what, "lengths": f"{QUESTION} + {ANSWER}", **summary(list(desk.uses(system)))}


def summary(uses: list[Use]) -> dict[str, Any]:
    return {
        "steps": len(uses),
        "steps with more than the fewest": sum(use.ours > use.fewest for use in uses),
        "most blocks": max(use.ours for use in uses),
        "saved of no sharing": saved(uses, "unshared"),
        "of its length": saved(uses, "of_its_length"),
        "of the context": saved(uses, "of_the_context"),
    }


def saved(uses: list[Use], against: str) -> str:
    return f"{1 - sum(use.ours for use in uses) / sum(getattr(use, against) for use in uses):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    as_json = parser.parse_args().json
    logging.getLogger("transformers").setLevel(logging.ERROR)
    desk = Desk()
    show_header(header(model="the bundled one, fp32", block_size=desk.size, requests=REQUESTS), as_json=as_json)
    table = Table("Blocks in use", as_json=as_json)
    for search in (False, True):
        for lengths in (ALPACA, SHARE_GPT):
            for count in (2, 4, 6):
                table.add(several(desk, lengths, count, search=search))
    for sessions in SESSIONS:
        table.add(behind_a_system_prompt(desk, sessions))


if __name__ == "__main__":
    main()
