"""What the page says and offers where the bundled tutor answers."""

from gradio.components.chatbot import OptionDict

from chatpage import tutor
from chatpage.conversation import Conversation

NAME = "the bundled tutor, a small demo model that knows one subject"
WELCOME = "### Ask the tutor\nA small demo model that knows one subject: paged attention, and this page. "
REAL_MODEL = "To load a real model: <code>python app.py --model PATH-OR-HUB-ID</code>"
EXAMPLES = 6


def examples() -> list[str]:
    """Questions to begin with: as many as there is room for in an empty chat."""
    return tutor.examples()[:EXAMPLES]


def options(conversation: Conversation) -> list[OptionDict]:
    """Questions to go on with, which the Chatbot draws below the last answer.

    There are none while it is written, where it failed or says nothing, and while several replies stand side by side:
    which of them is gone on from is chosen first.
    """
    shown = conversation.shown
    if not shown or conversation.busy or conversation.replies:
        return []
    answer = shown[-1]
    if not answer.text or answer.finish_reason == "error":
        return []
    return [{"value": text} for text in tutor.suggestions(answer.text, [exchange.question for exchange in shown])]
