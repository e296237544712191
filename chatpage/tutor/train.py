"""Trains the bundled model from scratch: `python -m chatpage.tutor.train --out DIR`.

Some minutes on a large GPU, a night on a CPU. The seed fixes the lessons, their order and the first weights; on
one machine a second run gives the same losses up to the rounding of the GPU's kernels.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatpage.tutor import FACTS_FILE, texts, tokenizer
from chatpage.tutor.lessons import ASKING, Mix, Teacher

CONTEXT = 1024
SHORT = 256
"""Tokens of a short row: a first question and what follows it. A long row fills the whole context with turns."""
LONG_EVERY = 4
SHARE = 1024
"""Rows that one process makes at a time, with a seed of their own."""
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Plan:
    """One training run. A step takes `rows` short rows, or a quarter of that many long ones: the same tokens."""

    steps: int
    rows: int
    asking: float = ASKING
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 100
    dropout: float = 0.1
    """Of the embeddings."""
    split: float = 0.1
    """How often a question's token is split into the two that it was merged from, so that new words look less new."""
    seed: int = 1
    lessons: int = 786432
    """Different short rows at most; long ones a 24th of them. Longer runs see them again in another order."""

    @property
    def long_rows(self) -> int:
        return max(1, self.rows * SHORT // CONTEXT)

    def rate(self, step: int) -> float:
        """The factor of the learning rate: a linear warm-up, then a cosine down to a twentieth."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def config() -> LlamaConfig:
    """A Llama of 3.54 million parameters, 7 MB in bfloat16; four query heads share a key-value head."""
    return LlamaConfig(
        vocab_size=tokenizer.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.END,
        pad_token_id=tokenizer.PAD,
    )


@dataclass(slots=True)
class Rows:
    """Training rows of one length, drawn in a fixed order that is shuffled anew for each pass."""

    tokens: torch.Tensor
    """int16 [rows, length], on the device."""
    labels: torch.Tensor
    """int16 [rows, length]: the tokens of answers and of their ends, IGNORE elsewhere."""

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.tokens.to(device), self.labels.to(device))

    def batches(self, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless batches of tokens and labels, int64 [size, length]."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        while True:
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.tokens), generator=generator)])
            chosen, order = order[:size].to(self.tokens.device), order[size:]
            yield self.tokens[chosen].long(), self.labels[chosen].long()


def make_rows(coder: PreTrainedTokenizerFast, plan: Plan, count: int, length: int) -> Rows:
    """That many conversations, cut to `length` tokens and filled up with padding; on the CPU, by all its cores."""
    counts = [min(SHARE, count - start) for start in range(0, count, SHARE)]
    seeds = [f"{plan.seed} {length} {number}" for number in range(len(counts))]
    with ProcessPoolExecutor(min(len(counts), os.cpu_count() or 1)) as pool:
        tokens = np.concatenate(list(pool.map(partial(share, coder, plan, length), counts, seeds)))
    labels = np.where(answered(tokens), tokens, np.int16(IGNORE))
    return Rows(torch.from_numpy(tokens), torch.from_numpy(labels))


def share(coder: PreTrainedTokenizerFast, plan: Plan, length: int, count: int, seed: str) -> np.ndarray:
    """int16 [count, length]: the conversations of one teacher."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    corpus = texts.load()
    teacher = Teacher(corpus, seed, Mix(asking=plan.asking))
    chats = [tokenizer.render(teacher.conversation(turns(teacher, length))) for _ in range(count)]
    parts = tokenizer.parts(coder)
    tokens = np.full((count, length), tokenizer.PAD, dtype=np.int16)
    for row, encoding in zip(tokens, coder.backend_tokenizer.encode_batch(chats), strict=True):
        ids = split_questions(encoding.ids, parts, plan.split, teacher.rng)[:length]
        row[: len(ids)] = ids
    return tokens


def split_questions(ids: list[int], parts: dict[int, list[int]], chance: float, rng: random.Random) -> list[int]:
    """The ids with some tokens of users' turns replaced by the two that they were merged from: the same text."""
    split: list[int] = []
    asks = False
    for id in ids:
        if id <= tokenizer.ASSISTANT:
            asks = id == tokenizer.USER
        split += parts[id] if asks and id in parts and rng.random() < chance else [id]
    return split


def turns(teacher: Teacher, length: int) -> int:
    """How many turns: a short row begins a chat, a long one is filled."""
    return teacher.rng.randint(1, 5) if length == SHORT else 24


def answered(tokens: np.ndarray) -> np.ndarray:
    """bool [rows, length]: the token belongs to an answer, or ends it."""
    places = np.arange(tokens.shape[1])
    speaks = np.isin(tokens, (tokenizer.SYSTEM, tokenizer.USER, tokenizer.ASSISTANT))
    last = np.maximum.accumulate(np.where(speaks, places, 0), axis=1)
    speaker = np.take_along_axis(tokens, last, axis=1)
    return (speaker == tokenizer.ASSISTANT) & ~speaks & (tokens != tokenizer.PAD)


def optimizer(model: LlamaForCausalLM, plan: Plan, device: torch.device) -> torch.optim.AdamW:
    """AdamW; norms and other vectors do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def answer_loss(
    model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, in nats."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.device.type == "cuda"):
        embedded = F.dropout(model.get_input_embeddings()(tokens), dropout)
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def fit(model: LlamaForCausalLM, short: Rows, long: Rows, plan: Plan) -> list[float]:
    """Trains in place; returns and prints the mean loss of every hundred steps."""
    device = short.tokens.device
    adam = optimizer(model, plan, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, plan.rate)
    short_batches, long_batches = short.batches(plan.rows, plan.seed), long.batches(plan.long_rows, plan.seed)
    losses, total, counted = [], torch.zeros((), device=device), 0
    model.train()
    for step in range(1, plan.steps + 1):
        batch = next(long_batches if step % LONG_EVERY == 0 else short_batches)
        loss = answer_loss(model, *batch, dropout=plan.dropout)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        adam.zero_grad()
        total, counted = total + loss.detach(), counted + 1
        if step % 100 == 0 or step == plan.steps:
            losses.append(round(total.item() / counted, 4))
            print(f"step {step:5d}  loss {losses[-1]:.4f}", flush=True)
            total, counted = torch.zeros((), device=device), 0
    return losses


def save(model: LlamaForCausalLM, coder: PreTrainedTokenizerFast, out: Path, facts: dict) -> None:
    """Writes the folder that `transformers` and the page load: weights in bfloat16, tokenizer, configs, facts."""
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=tokenizer.END, pad_token_id=tokenizer.PAD)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(out)
    coder.save_pretrained(out)
    (out / FACTS_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def train(out: Path, plan: Plan, device: torch.device) -> None:
    """Corpus to folder: tokenizer, lessons, training, saving."""
    began = time.monotonic()
    corpus = texts.load()
    coder = tokenizer.train(corpus, CONTEXT)
    count = min(plan.lessons, plan.steps * plan.rows)
    short = make_rows(coder, plan, count, SHORT)
    long = make_rows(coder, plan, max(1, count // 24), CONTEXT)
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(config())
    torch.nn.Module.to(model, device)
    print(f"{count} short and {len(long.tokens)} long lessons made in {time.monotonic() - began:.0f} s", flush=True)
    losses = fit(model, short.to(device), long.to(device), plan)
    seconds = round(time.monotonic() - began)
    training = {
        **asdict(plan),
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "seconds": seconds,
        "losses": losses,
    }
    save(model, coder, out, {"default_system_prompt": corpus.systems[0], "training": training})
    print(f"saved to {out} after {seconds} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chatpage.tutor.train", description="Train the bundled model.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, help="short rows a step: 256 on a GPU, 32 on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    rows = given.rows or (256 if given.device == "cuda" else 32)
    train(given.out, Plan(given.steps, rows, seed=given.seed), torch.device(given.device))


if __name__ == "__main__":
    main()
