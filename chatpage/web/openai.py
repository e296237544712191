"""`/v1`: the chat API in OpenAI's shapes."""

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from chatpage.engine import Engine
from chatpage.errors import Unavailable
from chatpage.schedule.request import Delta, Logprob, Prompt, Request
from chatpage.settings import Settings
from chatpage.stream import Stream, side_by_side
from chatpage.text.token_text import TokenTexts
from chatpage.web.chat_request import ChatRequest, parse
from chatpage.web.errors import Refusal, as_refusal, error_body

log = logging.getLogger(__name__)

SESSION_HEADER = "X-ChatPage-Session"
# Bytes of a body that is read on the event loop, in a few milliseconds at most. A megabyte of JSON takes long enough
# for others to notice, and is read on a thread. But hundreds of threads at once would hold up the loop and the engine
# more: all of them wait for their turn to run Python.
SHORT_BODY = 8192
READ_AT_ONCE = 8  # short bodies, before the loop turns to others: their next pieces shall not wait for a crowd
PING_SECONDS = 15
STOP_SECONDS = 1  # for a stream to say good-bye when the server stops
LOWEST_LOGPROB = -9999.0  # OpenAI's number for a token that is all but impossible; JSON has no infinity
DONE = b"data: [DONE]\n\n"
MARK = "\ue000"  # stands for a text


@dataclass(frozen=True, slots=True)
class Answer:
    """What all chunks of one answer have in common, and the bodies made from it."""

    model: str
    include_usage: bool
    texts: TokenTexts | None = None  # where log-probabilities were asked for
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _around: dict[int, list[bytes]] = field(default_factory=dict)  # the text, in the chunks of each reply

    def text_chunk(self, index: int, text: str, logprobs: Sequence[Logprob] = ()) -> bytes:
        """A chunk with text. Those of one reply differ in nothing else, so the rest is written once."""
        if logprobs:
            return self.chunk(index, {"content": text}, logprobs)
        if index not in self._around:
            self._around[index] = self.chunk(index, {"content": MARK}).rsplit(json.dumps(MARK).encode(), 1)
        before, after = self._around[index]
        return b"%b%b%b" % (before, json.dumps(text).encode(), after)

    def chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: Sequence[Logprob] = (),
        last: Delta | None = None,
    ) -> bytes:
        named = self._logprobs(logprobs) if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": named, **self._ending(last)}
        return self._chunk([choice], {"usage": None} if self.include_usage else {})

    def usage_chunk(self, replies: Sequence[Delta]) -> bytes:
        return self._chunk([], {"usage": usage(replies)})

    def whole(self, replies: Sequence[Delta]) -> dict[str, Any]:
        """The body of an answer that is not streamed, from all deltas of each reply as one."""
        choices = [self._choice(index, total) for index, total in enumerate(replies)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(replies)}

    def _choice(self, index: int, total: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": total.text, "refusal": None}
        logprobs = self._logprobs(total.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, **self._ending(total)}

    @staticmethod
    def _ending(last: Delta | None) -> dict[str, Any]:
        """Why it ended, if it has; and the score of an answer that was searched for, which OpenAI has no field for."""
        if last is None or last.score is None:
            return {"finish_reason": last and last.finish_reason}
        return {"finish_reason": last.finish_reason, "score": last.score}

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        """One entry for each token that was drawn, those of the end included, which are not shown."""
        if self.texts is None:
            return None
        entries = [
            {
                **self._entry(drawn.token, drawn.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in drawn.top],
            }
            for drawn in logprobs
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        assert self.texts is not None
        text, raw = self.texts.of(token)
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": None if raw is None else list(raw)}

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return sse({**self._head("chat.completion.chunk"), "choices": choices, **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class StreamedAnswer(Response):
    """An answer as server-sent events. However the response ends, `finish` is called.

    A generator's `finally` would not do: where the client leaves before the first byte, the generator never starts.
    The stream has `data:` and comments only; other fields of SSE, `id:` among them, break OpenAI's client.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        headers: dict[str, str],
        *,
        stop: Callable[[], None],
        finish: Callable[[], None],
    ) -> None:
        self._stop, self._finish = stop, finish
        self._stopping = anyio.Event()
        self._response = EventSourceResponse(
            chunks,
            headers=headers,
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            shutdown_event=self._stopping,
            shutdown_grace_period=STOP_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._stop_with_server())
        try:
            await self._response(scope, receive, send)
        finally:
            watch.cancel()
            self._finish()

    async def _stop_with_server(self) -> None:
        await self._stopping.wait()
        self._stop()


class Api:
    """The routes below /v1, for one engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.api_key = settings.api_key
        self.busy: set[str] = set()  # sessions with a turn that runs
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.engine.core.tokenizer)

    def routes(self) -> list[Route]:
        return [
            Route("/chat/completions", self.chat, methods=["POST"]),
            Route("/models", self.models, methods=["GET"]),
            Route("/models/{name:path}", self.model, methods=["GET"]),
        ]

    # -- /v1/models -----------------------------------------------------------------------------------------------

    async def models(self, request: HttpRequest) -> Response:
        self._check_access(request)
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: HttpRequest) -> Response:
        self._check_access(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {"id": self.engine.model_name, "object": "model", "created": 0, "owned_by": "chatpage"}

    # -- /v1/chat/completions -------------------------------------------------------------------------------------

    async def chat(self, request: HttpRequest) -> Response:
        self._check_access(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "The Content-Type must be application/json.", code="unsupported_media_type")
        body = await request.body()
        asked, prompt = await self._read_in_turn(body)
        texts = None if asked.params.logprobs is None else self.texts
        with self._opened_session(request) as session:
            streams, finish = self._submit(prompt, asked, session)
        answer = Answer(self.engine.model_name, asked.include_usage, texts)
        headers = {SESSION_HEADER: session} if session else {}
        if asked.stream:
            chunks = self._chunks(streams, answer)
            return StreamedAnswer(chunks, headers, stop=partial(_cancel, streams), finish=finish)
        try:
            return await self._whole(request, streams, answer, headers)
        finally:
            finish()

    def _check_access(self, request: HttpRequest) -> None:
        if not is_authorized(request, self.api_key):
            raise Refusal(401, "The API key is missing or wrong.", code="invalid_api_key")
        if self.engine.status != "ready":
            raise Unavailable(f"{self.engine.detail}; please try again in a moment.")

    def _check_model(self, name: str) -> None:
        if name != self.engine.model_name:
            raise Refusal(
                404, f"This server has only the model {self.engine.model_name}.", param="model", code="model_not_found"
            )

    async def _read_in_turn(self, body: bytes) -> tuple[ChatRequest, Prompt]:
        if len(body) > SHORT_BODY:
            return await asyncio.to_thread(self._read, body)
        async with self._reading:
            await asyncio.sleep(0)  # now the loop turns to others
            return self._read(body)

    def _read(self, body: bytes) -> tuple[ChatRequest, Prompt]:
        asked = parse(body)
        if asked.model is not None:
            self._check_model(asked.model)
        return asked, self.engine.prompt(asked.messages)

    @contextmanager
    def _opened_session(self, request: HttpRequest) -> Iterator[str | None]:
        """The key of the session that the request names, or of a new one where we do not know that name.

        None where the header is missing: the request has no session. A new session that the request is then refused
        for is closed again.
        """
        key = request.headers.get(SESSION_HEADER)
        if key is None:
            yield None
        elif self.engine.has_session(key):
            yield key
        else:
            key = self.engine.open_session().key
            try:
                yield key
            except BaseException:
                self.engine.close_session(key)
                raise

    def _submit(
        self, prompt: Prompt, asked: ChatRequest, session: str | None
    ) -> tuple[list[Stream], Callable[[], None]]:
        """Start the request. Returns a stream for each reply, and what must be called at its end, whatever that is."""
        if session in self.busy:
            raise Refusal(409, "This session has a turn that is still running; wait for it.", code="session_busy")
        request = Request(prompt, asked.params, session=session, owner=self.api_key, beams=asked.beams)
        streams = self.engine.streams(request, [None] * asked.replies)
        if session is not None:
            self.busy.add(session)

        ending = ExitStack()  # it happens once: then others may use the session
        ending.callback(self.busy.discard, session or "")
        ending.callback(_cancel, streams)
        return streams, ending.close

    async def _chunks(self, streams: list[Stream], answer: Answer) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer: for each reply a role, text as it comes and an ending; at last `[DONE]`.

        Where a reply fails, an error is the last event before that.

        A chunk of text brings the log-probabilities of all tokens so far: they come with their text, or before it where
        the end of a token's text is still held back. Tokens that have no text wait for the next one that has; the last
        of them, like the end of turn, come with the ending.
        """
        yield b"".join(answer.chunk(index, {"role": "assistant", "content": ""}) for index in range(len(streams)))
        unsent: list[bytes] = []  # what is to be sent at once: each time that something is costs more than its bytes
        try:
            logprobs: list[list[Logprob]] = [[] for _ in streams]
            lasts: dict[int, Delta] = {}
            async for index, delta in side_by_side(streams):
                logprobs[index] += delta.logprobs
                if delta.text:
                    unsent.append(answer.text_chunk(index, delta.text, logprobs[index]))
                    logprobs[index] = []
                if delta.state == "done":
                    self._raise_if_failed(delta)
                    unsent.append(answer.chunk(index, {}, logprobs[index], delta))
                    lasts[index] = delta
                if unsent and len(lasts) < len(streams):
                    yield b"".join(unsent)
                    unsent.clear()
            if answer.include_usage:
                unsent.append(answer.usage_chunk([lasts[index] for index in range(len(streams))]))
        except Exception as error:
            refusal = as_refusal(error)
            if not isinstance(error, Refusal):
                log.exception("A streamed answer failed")
            unsent.append(sse(error_body(refusal.status_code, refusal.detail, code=refusal.code)))
        yield b"".join([*unsent, DONE])

    async def _whole(
        self, request: HttpRequest, streams: list[Stream], answer: Answer, headers: dict[str, str]
    ) -> Response:
        watch = asyncio.create_task(_cancel_when_client_leaves(request.receive, streams))
        replies: list[Delta] = []
        try:
            for stream in streams:
                replies.append(Delta.merged([delta async for delta in stream]))
                self._raise_if_failed(replies[-1])
        finally:
            watch.cancel()
        # A thousand tokens with twenty alternatives each take a tenth of a second to name and write.
        return await asyncio.to_thread(lambda: JSONResponse(answer.whole(replies), headers=headers))

    def _raise_if_failed(self, last: Delta) -> None:
        if last.finish_reason == "error":
            raise Refusal(500, last.error or "The answer failed.", code="generation_failed")
        if last.finish_reason == "abort":
            why = "the session was closed" if self.engine.status == "ready" else "the server is stopping"
            raise Refusal(503, f"The answer was stopped: {why}.", code="service_unavailable")


def is_authorized(request: HttpRequest, api_key: str | None) -> bool:
    """Whether the request brings the key, if one is asked for. Takes as long for any wrong key."""
    return api_key is None or hmac.compare_digest(bearer(request).encode(), api_key.encode())


def bearer(request: HttpRequest) -> str:
    """The token of `Authorization: Bearer …`, or an empty string."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def usage(replies: Sequence[Delta]) -> dict[str, Any]:
    """What the last deltas of all replies to one prompt say; the prompt counts once."""
    first, completion = replies[0], sum(last.completion_tokens for last in replies)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
    }


def sse(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


async def _cancel_when_client_leaves(receive: Receive, streams: list[Stream]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    _cancel(streams)


def _cancel(streams: list[Stream]) -> None:
    for stream in streams:
        stream.cancel()
