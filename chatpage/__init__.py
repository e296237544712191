"""ChatPage: a chat page on a paged KV cache that you can watch.

    from chatpage import ChatPage
    ChatPage("path-or-hub-id", system_prompt="You are a guide.").launch()

The names below are loaded when they are first used, so that `import chatpage.cache` loads neither torch nor Gradio.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatpage.engine import Engine
    from chatpage.launch import ChatPage
    from chatpage.schedule.params import SamplingParams
    from chatpage.settings import Settings

__all__ = ["ChatPage", "Engine", "SamplingParams", "Settings"]

_HOMES = {
    "ChatPage": "chatpage.launch",
    "Engine": "chatpage.engine",
    "SamplingParams": "chatpage.schedule.params",
    "Settings": "chatpage.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chatpage' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
