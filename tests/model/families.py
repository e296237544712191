"""The engine's greedy answers to the prompts of tests/families.py."""

from pathlib import Path

from chatpage.schedule.request import Prompt, Request
from tests.engine.harness import greedy, paused, read, start
from tests.families import ANSWER, prompts


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
