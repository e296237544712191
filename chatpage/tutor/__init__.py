"""The bundled model: its texts, its training, its weights.

A tiny Llama that knows one subject, paged attention and this page, so that the page answers with no download.
`corpus/` holds the texts, `texts` reads them, `classifier` looks for unclear ones, `lessons` makes conversations of
them, `train` trains on those, and `evaluate` holds an exam. Importing this package loads neither torch nor
transformers.
"""

import json
from pathlib import Path

from chatpage.tutor.guide import suggestions

__all__ = ["FACTS_FILE", "examples", "path", "suggestions", "system_prompt"]

FACTS_FILE = "chatpage.json"
"""Beside the weights: the default system prompt, and how the model was trained."""


def path() -> Path:
    """The folder of the bundled model, as `transformers` loads it."""
    return Path(__file__).parent / "weights"


def system_prompt() -> str:
    """The system prompt that the bundled model was trained with, and that stands in front of its chats."""
    return json.loads((path() / FACTS_FILE).read_text(encoding="utf-8"))["default_system_prompt"]


def examples() -> list[str]:
    """Questions that a visitor may start with, and that the bundled model answers well."""
    return [
        "What is a KV cache?",
        "Why does contiguous reservation waste memory?",
        "What is paged attention?",
        "What is a block table?",
        "How is the system prompt shared?",
        "What is copy-on-write?",
        "What happens when memory is full?",
        "What does the panel show?",
        "How do I load a real model?",
    ]
