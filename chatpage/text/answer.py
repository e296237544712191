"""From drawn tokens to text that may be sent, and to the moment when an answer ends."""

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from chatpage.schedule.request import FinishReason
from chatpage.text.detokenize import detokenizer
from chatpage.text.stop import StopStrings


class Answer:
    """One answer in the making.

    Args:
        stop_token_ids: tokens that end the answer; they are never shown.
        stops: strings that end the answer; neither they nor their heads are ever shown.
        limit: end after so many tokens.
        min_tokens: a stop string that is complete within the text of so many tokens is text like any other, as in vLLM.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Collection[int],
        stops: tuple[str, ...],
        limit: int,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._stop_token_ids = stop_token_ids
        self._limit = limit
        self._min_tokens = min_tokens
        self._count = 0

    def add(self, token: int) -> tuple[str, FinishReason | None]:
        """Take in the next token. Returns text that is certain now, and why the answer ends, if it does."""
        self._count += 1
        if token in self._stop_token_ids:
            return self.flush(), "stop"
        text, stopped = self._stops.add(self._detokenizer.add(token), exempt=self._count <= self._min_tokens)
        if stopped:
            return text, "stop"
        if self._count < self._limit:
            return text, None
        rest, stopped = self._rest()
        return text + rest, "stop" if stopped else "length"

    def flush(self) -> str:
        """What was held back, once no token follows."""
        return self._rest()[0]

    def _rest(self) -> tuple[str, bool]:
        text, stopped = self._stops.add(self._detokenizer.flush(), exempt=self._count <= self._min_tokens)
        return text + self._stops.flush(), stopped
