"""A scheduler in a few lines: greedy answers from a ModelRunner, and from transformers itself."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from chatpage.model.batch import Draw, Row
from chatpage.model.step import ModelRunner
from chatpage.schedule.params import SamplingParams

GREEDY = SamplingParams(temperature=0)
ANSWER = 40


@dataclass
class Sequence:
    """A prompt that grows by its answer.

    Attributes:
        tokens: prompt and answer.
        table: blocks for all of it.
        computed: tokens whose keys and values are in the pool; more than 0 where a prefix is shared.
        begins: step in which it comes in.
        chunk: tokens of the prompt that run in one step at most.
    """

    tokens: list[int]
    table: list[int]
    computed: int = 0
    begins: int = 0
    chunk: int = 10_000
    prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self.prompt = len(self.tokens)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt :]

    def row(self) -> Row:
        end = min(len(self.tokens), self.computed + self.chunk)
        draw = Draw(GREEDY, seed=0, choice=0, position=end) if end == len(self.tokens) else None
        return Row(self.tokens[self.computed : end], self.computed, self.table, sample=draw)


def scattered_tables(count: int, tokens: int, block_size: int, num_blocks: int) -> list[list[int]]:
    """Block tables for `count` sequences of `tokens` tokens: blocks of the pool in no order."""
    order = (torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)) + 1).tolist()
    blocks = -(-tokens // block_size)
    assert count * blocks <= num_blocks
    return [order[i * blocks : (i + 1) * blocks] for i in range(count)]


def answer(runner: ModelRunner, sequences: list[Sequence], tokens: int = ANSWER) -> list[list[int]]:
    """Run all sequences side by side until each has its answer."""
    step = 0
    while running := [s for s in sequences if len(s.answer) < tokens]:
        running = [s for s in running if s.begins <= step]
        rows = [s.row() for s in running]
        for sequence, row, drawn in zip(running, rows, runner.run(rows), strict=True):
            sequence.computed += len(row.tokens)
            if row.sample:
                assert drawn.token is not None, drawn.error
                sequence.tokens.append(drawn.token)
        step += 1
    return [s.answer for s in sequences]


def their_answer(model: PreTrainedModel, prompt: list[int], tokens: int = ANSWER) -> list[int]:
    """What transformers' own `generate` says."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones(1, len(prompt))
    )
    return out[0, len(prompt) :].tolist()


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths; none is a multiple of a block."""
    random = torch.Generator().manual_seed(2)
    return [torch.randint(5, 320, (13 + 6 * i,), generator=random).tolist() for i in range(count)]
