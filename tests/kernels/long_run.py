"""Many steps over blocks that many share: none of them may change by a bit, and no answer may be NaN.

    python -m tests.kernels.long_run --steps 100000 --seed 7

Rows with beginnings in common append to blocks of their own, one token at a time or some, run their last token again,
and start anew when their blocks are full. The beginnings end inside a block, which each row copies before it writes.
Now and then the shared blocks' checksum is taken, and the step's answer is compared with the float64 oracle.
"""

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from chatpage.kernels.copy import BlockCopier
from chatpage.model.attention import AttentionCall
from chatpage.model.batch import Batch, Row
from chatpage.model.kv import KVPool, LayerShape
from chatpage.model.paged import PagedAttention
from tests.kernels import oracle
from tests.kernels.case import TOLERANCES, distance

BLOCK_SIZE = 16
HEADS, SHAPE = 8, LayerShape(2, 64, 64)
ROWS, OWN_BLOCKS, CHUNK = 16, 5, 24
FILL = 5  # tokens of a beginning in its last block
NUMBERS = 8192  # tokens' worth of random queries, keys and values, of which each step takes a part
CHECK_EVERY = 1000


@dataclass
class Member:
    """A sequence: `trunk` is its beginning's full blocks, `tail` the one that it copies."""

    trunk: list[int]
    tail: int
    own: list[int]
    length: int = 0

    @property
    def beginning(self) -> int:
        return len(self.trunk) * BLOCK_SIZE + FILL

    @property
    def room(self) -> int:
        return (len(self.trunk) + len(self.own)) * BLOCK_SIZE - self.length

    def row(self, tokens: int, *, again: bool = False) -> Row:
        start = self.length - tokens if again else self.length
        return Row([0] * tokens, start, [*self.trunk, *self.own], store=not again)


class Run:
    """The pool, who is in it, and the steps."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(seed)
        trunks, tails = [8, 3 + 4, 1], 3
        blocks = sum(trunks) + tails + ROWS * OWN_BLOCKS
        free = self.random.sample(range(1, blocks + 1), blocks)
        long = [free.pop() for _ in range(trunks[0])]
        beginnings = [long, long[:3] + [free.pop() for _ in range(4)], [free.pop()]]
        ends = [free.pop() for _ in beginnings]
        self.shared = sorted({block for trunk in beginnings for block in trunk} | set(ends))
        self.members = []
        for i in range(ROWS):
            which = 0 if i < ROWS // 2 else 1 + i % 2
            self.members.append(Member(beginnings[which], ends[which], [free.pop() for _ in range(OWN_BLOCKS)]))
        self.pool = KVPool((SHAPE,), blocks, BLOCK_SIZE, self.device, dtype)
        for memory in (*self.pool.keys, *self.pool.values):
            memory.fill_(torch.nan)
            memory[self.shared] = torch.randn_like(memory[self.shared])
            memory[ends, FILL:] = torch.nan
        self.copier = BlockCopier([*self.pool.keys, *self.pool.values])
        kinds = ((HEADS, SHAPE.key_size), (SHAPE.kv_heads, SHAPE.key_size), (SHAPE.kv_heads, SHAPE.value_size))
        self.numbers = [torch.randn(NUMBERS, *kind, device=self.device, dtype=dtype) for kind in kinds]
        sinks = torch.randn(HEADS, device=self.device, dtype=dtype)
        plain = {"scaling": 0.2, "window": None, "softcap": None, "sinks": None}
        self.settings = [plain, plain | {"window": 50}, plain | {"sinks": sinks, "softcap": 5.0}]
        self.total = torch.zeros((), device=self.device)  # NaN from the first answer on that is
        self.tokens = 0
        self.restart(self.members)
        self.checksum = self.sum_up()

    def restart(self, members: list[Member]) -> None:
        if members:
            self.copier.copy([(member.tail, member.own[0]) for member in members])
        for member in members:
            member.length = member.beginning

    def sum_up(self) -> str:
        """The checksum of what is shared."""
        memory = [memory[self.shared].cpu().contiguous() for memory in (*self.pool.keys, *self.pool.values)]
        return hashlib.sha256(b"".join(part.view(torch.uint8).numpy().tobytes() for part in memory)).hexdigest()

    def step(self, compare: bool) -> float:
        """Do one; answers the error of its answer if that is asked for."""
        members = self.random.sample(self.members, self.random.randint(1, ROWS))
        self.restart([member for member in members if member.room < CHUNK])
        rows = []
        for member in members:
            kind = self.random.random()
            if kind < 0.1:
                rows.append(member.row(1, again=True))
                continue
            rows.append(member.row(self.random.randint(2, CHUNK) if kind > 0.95 else 1))
            member.length += len(rows[-1].tokens)
        batch = Batch.build(rows, block_size=BLOCK_SIZE, device=self.device)
        tokens = sum(len(row.tokens) for row in rows)
        first = self.random.randrange(NUMBERS - tokens)
        query, key, value = (part[first : first + tokens] for part in self.numbers)
        settings = self.random.choice(self.settings)
        attention = PagedAttention(self.pool, batch, shared=self.random.choice([True, False, None]))
        out = attention.attend(0, query, key, value, AttentionCall(**settings))
        self.total += out.sum(dtype=torch.float32)
        self.tokens += tokens
        return self._error(out, batch, query, key, value, settings) if compare else 0.0

    def _error(self, out: Tensor, batch: Batch, query: Tensor, key: Tensor, value: Tensor, settings: Any) -> float:
        keys, values = self.pool.keys[0], self.pool.values[0]
        return distance(out, oracle.attention(keys, values, batch, query, key, value, **settings))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    began, worst = time.monotonic(), 0.0
    run = Run(options.seed)
    for number in range(1, options.steps + 1):
        checked = number % CHECK_EVERY == 0 or number == options.steps
        error = run.step(checked)
        worst = max(worst, error)
        if not checked:
            continue
        if run.sum_up() != run.checksum:
            return _failed(f"shared blocks changed between steps {max(0, number - CHECK_EVERY)} and {number}")
        if not run.total.isfinite():
            return _failed(f"an answer is no number, between steps {max(0, number - CHECK_EVERY)} and {number}")
        if not error < TOLERANCES[run.numbers[0].dtype]:
            return _failed(f"error {error:.2g} in step {number}")
    print(
        f"{options.steps} steps, {run.tokens} tokens, {time.monotonic() - began:.0f} s on {run.device.type}: "
        f"the checksum of {len(run.shared)} shared blocks is still {run.checksum[:16]}, "
        f"no answer is NaN, the largest error is {worst:.2g}"
    )
    return 0


def _failed(what: str) -> int:
    print(what, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
