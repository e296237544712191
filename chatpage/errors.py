"""What went wrong, said in one sentence that a user can act on."""


class ChatPageError(Exception):
    """A mistake that its maker can mend: the message names what, its value, and what is allowed."""


class SettingError(ChatPageError):
    """A setting that cannot be obeyed. The process ends with status 2 before any work is done."""


class ModelError(ChatPageError):
    """A model that cannot be loaded, or that would be silently wrong. Status 2, like a setting."""


class RequestError(ChatPageError):
    """A request that is refused before any work.

    `param` names the field that is wrong (`messages[0].role`), `code` is OpenAI's code for it where there is one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Busy(ChatPageError):
    """The queue is full: safe to try again later."""


class Unavailable(ChatPageError):
    """The engine is loading, stopping or dead."""
