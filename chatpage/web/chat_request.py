"""What a client asks of `/v1/chat/completions`, read strictly: what we cannot do is refused, not ignored in silence."""

import json
import logging
import re
from dataclasses import dataclass, replace
from typing import Any

from chatpage.errors import RequestError
from chatpage.schedule.beam import Beams
from chatpage.schedule.params import MAX_LOGPROBS, MAX_REPLIES, SamplingParams, require_whole

log = logging.getLogger(__name__)

MAX_MESSAGES = 1024
NEARLY_GREEDY = 0.01  # below this temperature the likeliest token wins anyway, and dividing by it overflows
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
ROLES = ("system", "developer", "user", "assistant", "tool")

# Fields that would change the answer and that this version does not obey, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "ignore_eos": (False,),
    "echo": (False,),
    "prompt_logprobs": (),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "cache_salt": (),
    "request_id": (),
    "priority": (0,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
# Fields that `SamplingParams` has by the same name, and checks.
PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
)
# Fields that say how a beam search goes, with the values that ask for nothing where there is none.
BEAMS: dict[str, Any] = {"beam_width": 1, "length_penalty": 1, "early_stopping": False}
BEAM_WIDTH = 4  # where the client leaves the choice to us
USED = {
    "messages",
    "n",
    "model",
    "stream",
    "stream_options",
    *PLAIN,
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "stop",
    "stop_token_ids",
    "max_tokens",
    "max_completion_tokens",
    "use_beam_search",
    *BEAMS,
}
# OpenAI's fields that change nothing about the answer.
HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request, checked. `model` is None where the client leaves the choice to us."""

    messages: list[dict[str, str]]
    params: SamplingParams
    replies: int
    beams: Beams | None
    model: str | None
    stream: bool
    include_usage: bool


def parse(body: bytes) -> ChatRequest:
    """Read a request's body.

    Raises:
        RequestError: it is not what the API asks for; `param` and `code` say where and why.
    """
    fields = _json_object(body)
    _refuse_unsupported(fields)
    stream = _boolean(fields, "stream", "stream")
    replies = _replies(fields.get("n"))
    return ChatRequest(
        messages=_messages(fields.get("messages")),
        params=_params(fields),
        replies=replies,
        beams=_beams(fields, replies),
        model=_model(fields),
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options"), stream),
    )


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode("utf-8"))
    except RecursionError:
        raise RequestError("The body is nested too deeply.", code="invalid_json") from None
    except UnicodeDecodeError:
        raise RequestError("The body is not UTF-8.", code="invalid_json") from None
    except ValueError as error:  # malformed, or a number of thousands of digits
        where = f" (at character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"The body is not valid JSON{where}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    return fields


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name in UNSUPPORTED:
            if value is not None and not any(_same(value, harmless) for harmless in UNSUPPORTED[name]):
                raise RequestError(
                    f"{name} is not supported by this server; leave it out.", param=name, code="unsupported_parameter"
                )
        elif name not in USED and name not in HARMLESS:
            _warn_once()


def _same(value: Any, harmless: Any) -> bool:
    """Equal, where 1 is not True."""
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)


_warned = False


def _warn_once() -> None:
    """Once in the process, and without the client's words: neither a flood nor a forged line can come of it."""
    global _warned
    if not _warned:
        log.warning("A request to /v1 has fields that this server does not know; such fields are ignored.")
        _warned = True


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list of at least one message.", param="messages")
    if len(value) > MAX_MESSAGES:
        raise RequestError(f"messages has {len(value)} entries; at most {MAX_MESSAGES} are allowed.", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with a role and a content.", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES[:-1])}.", param=f"{where}.role")
    for field in ("tool_calls", "function_call", "tool_call_id"):
        if role == "tool" or message.get(field):
            raise RequestError(
                "Tools are not supported by this server.", param=f"{where}.role", code="unsupported_parameter"
            )
    content = _content(message.get("content"), f"{where}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _content(value: Any, where: str) -> str:
    """Text, from a string or from a list of text parts."""
    if isinstance(value, list) and value:
        return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
    return _text(value, where)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise RequestError(f"{where} must be an object with a type.", param=where)
    if part["type"] != "text":
        raise RequestError(
            f"{where} is not text; this server reads only text.", param=where, code="unsupported_content"
        )
    return _text(part.get("text"), f"{where}.text")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a string.", param=where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half of a surrogate pair, which is not text.", param=where) from None
    return value


def _model(fields: dict[str, Any]) -> str | None:
    value = fields.get("model")
    return None if value is None else _text(value, "model")


def _params(fields: dict[str, Any]) -> SamplingParams:
    """`SamplingParams` checks ranges; what OpenAI calls by other names is translated here."""
    given = {name: fields[name] for name in PLAIN if fields.get(name) is not None}
    if _boolean(fields, "use_beam_search", "use_beam_search"):
        given.setdefault("temperature", 0)  # nothing is drawn
    if given.get("top_k") == -1 and not isinstance(given["top_k"], bool):
        given["top_k"] = 0  # the other way to say: all of them
    params = SamplingParams(
        **given,
        max_tokens=_max_tokens(fields),
        logit_bias=_logit_bias(fields.get("logit_bias")),
        logprobs=_logprobs(fields),
        stop=_stop(fields.get("stop")),
        stop_token_ids=_stop_token_ids(fields.get("stop_token_ids")),
    )
    return replace(params, temperature=0) if 0 < params.temperature < NEARLY_GREEDY else params


def _replies(value: Any) -> int:
    if value is None:
        return 1
    require_whole("n", value, 1, MAX_REPLIES)
    return value


def _beams(fields: dict[str, Any], replies: int) -> Beams | None:
    given = {name: fields[name] for name in BEAMS if fields.get(name) is not None}
    if _boolean(fields, "use_beam_search", "use_beam_search"):
        width = given.pop("beam_width", max(BEAM_WIDTH, replies))
        return Beams(width, returned=replies, **given)
    for name, value in given.items():
        if not _same(value, BEAMS[name]):
            raise RequestError(f"{name} is only allowed with use_beam_search: true.", param=name)
    return None


def _max_tokens(fields: dict[str, Any]) -> Any:
    old, new = fields.get("max_tokens"), fields.get("max_completion_tokens")
    if old is not None and new is not None and (type(old), old) != (type(new), new):
        raise RequestError("max_tokens and max_completion_tokens differ; send one of them.", param="max_tokens")
    return old if new is None else new


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise RequestError("stop must be a string or a list of strings.", param="stop")
    return tuple(_text(text, "stop") for text in strings)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RequestError("stop_token_ids must be a list of token ids.", param="stop_token_ids")
    return tuple(value)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """OpenAI's object from token ids, which JSON can only have as strings, to biases."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise RequestError("logit_bias must be an object from token ids to biases.", param="logit_bias")
    for key in value:
        if not TOKEN_ID.fullmatch(key):
            raise RequestError(
                f'logit_bias has the key {key[:20]!r}; each must be a token id, like "50256".', param="logit_bias"
            )
    return tuple((int(key), bias) for key, bias in value.items())


def _logprobs(fields: dict[str, Any]) -> int | None:
    """How many alternatives are asked for; None where no log-probabilities are."""
    top = fields.get("top_logprobs")
    if not _boolean(fields, "logprobs", "logprobs"):
        if top is not None:
            raise RequestError("top_logprobs is only allowed with logprobs: true.", param="top_logprobs")
        return None
    if top is not None:
        require_whole("top_logprobs", top, 0, MAX_LOGPROBS)
    return top or 0


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options is only allowed with stream: true.", param="stream_options")
    if not isinstance(options, dict):
        raise RequestError("stream_options must be an object.", param="stream_options")
    return _boolean(options, "include_usage", "stream_options.include_usage")


def _boolean(fields: dict[str, Any], name: str, where: str) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise RequestError(f"{where} must be true or false.", param=where)
    return value
