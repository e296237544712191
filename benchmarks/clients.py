"""Many clients of /v1/chat/completions, in a process of their own: the server's must not pay for them.

    python -m benchmarks.clients URL < questions.json

Standard input: a line of JSON, {"questions": […], "new": tokens}, then an empty line when to begin. Standard output: a
line when all is prepared, then a line of JSON with what came of each question. Times are the system's monotonic ones,
which all processes of a machine have in common.
"""

import asyncio
import contextlib
import json
import sys
import time
from typing import Any

import httpx


async def main(url: str) -> None:
    asked = json.loads(sys.stdin.readline())
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        await client.get(f"{url}/healthz")  # what is imported late is imported now
        requests = [_request(client, url, text, asked["new"]) for text in asked["questions"]]
        print("ready", flush=True)
        sys.stdin.readline()
        answers = await asyncio.gather(*(ask(client, request) for request in requests))
    print(json.dumps(answers), flush=True)


def _request(client: httpx.AsyncClient, url: str, question: str, new: int) -> httpx.Request:
    body = {
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": new,
    }
    return client.build_request("POST", f"{url}/v1/chat/completions", json=body)


async def ask(client: httpx.AsyncClient, request: httpx.Request) -> dict[str, Any]:
    """When each piece of the answer came, how many tokens it has, and what went wrong, if anything."""
    begun, came, received, error = time.monotonic(), [], bytearray(), None
    try:
        response = await client.send(request, stream=True)
        async with contextlib.aclosing(response):
            async for piece in response.aiter_raw():
                came.append(time.monotonic())
                received += piece
            if response.status_code != 200 or b'data: {"error"' in received or not received.endswith(b"[DONE]\n\n"):
                error = f"{response.status_code}: {bytes(received[-200:])!r}"
    except httpx.HTTPError as failed:
        error = repr(failed)
    tokens = 0 if error else _usage(bytes(received))["completion_tokens"]
    return {"begun": begun, "came": came, "ended": time.monotonic(), "tokens": tokens, "error": error}


def _usage(received: bytes) -> dict[str, Any]:
    """Of the last event before the end mark."""
    *_, last, _done, _nothing = received.split(b"\n\n")
    return json.loads(last.removeprefix(b"data: "))["usage"]


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
