"""The engine's greedy answers to the prompts of tests/families.py."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from chatpage.schedule.request import Prompt, Request
from tests.engine.harness import greedy, paused, read, start
from tests.families import ANSWER, prompts

ROOT = Path(__file__).parents[2]


def write_families(root: Path, families: Iterable[str]) -> Path:
    """A folder for each family, with the answers of a process that never imports chatpage."""
    command = [sys.executable, "-m", "tests.families", str(root), *families]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def answer(folder: Path) -> tuple[list[list[int]], list[str]]:
    """Answers to all prompts, asked at once: in chunks of at most 7 tokens, beside each other's decodes.

    Returns:
        The tokens of each, and what the model's loading had to note.

    Raises:
        ChatPageError: the model is refused.
    """
    engine = start(folder, max_step_tokens=7, block_size=4, max_model_len=None)
    try:
        with paused(engine):
            streams = [engine.stream(Request(Prompt(tuple(prompt)), greedy(ANSWER))) for prompt in prompts()]
        return [read(stream).tokens for stream in streams], engine.core.loaded.notes
    finally:
        engine.stop()
