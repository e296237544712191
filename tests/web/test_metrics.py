"""How the server is, for machines."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.web.conftest import Served
from tests.web.fake import FakeEngine


def samples(url: str) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"{url}/metrics").text
    families = text_string_to_metric_families(text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics_count_what_happens(served: Served):
    before = samples(served.url)
    body = {"messages": [{"role": "user", "content": "Count me"}], "max_tokens": 5, "temperature": 0}
    headers = {"X-ChatPage-Session": ""}
    key = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers).headers["x-chatpage-session"]
    httpx.post(f"{served.url}/v1/chat/completions", json={**body, "model": "a-name-of-theirs"})
    after = samples(served.url)
    assert after["chatpage_generated_tokens_total",] - before["chatpage_generated_tokens_total",] == 5
    assert after["chatpage_requests_total", "length"] - before["chatpage_requests_total", "length"] == 1
    assert after["chatpage_sessions",] - before["chatpage_sessions",] == 1
    assert after.keys() == before.keys(), "a label came from a request"
    blocks = {state: after["chatpage_blocks", state] for state in ("free", "idle", "used")}
    assert sum(blocks.values()) == served.engine.num_blocks
    text = httpx.get(f"{served.url}/metrics").text
    assert key not in text
    assert "a-name-of-theirs" not in text
    served.engine.close_session(key)


@pytest.mark.parametrize(
    ("status", "has_work", "idle", "health", "code"),
    [
        ("starting", False, 99, "starting", 200),
        ("ready", False, 99, "idle", 200),
        ("ready", True, 1, "ok", 200),
        ("ready", True, 99, "stalled", 503),
        ("failed", False, 1, "dead", 503),
        ("stopping", True, 99, "stopping", 200),
    ],
)
def test_health(fake: tuple[str, FakeEngine], status: str, has_work: bool, idle: float, health: str, code: int):
    url, engine = fake
    engine.status, engine.has_work, engine.idle_seconds = status, has_work, idle
    answer = httpx.get(f"{url}/healthz")
    assert (answer.status_code, answer.json()) == (code, {"status": health})


@pytest.mark.parametrize("status", ["starting", "ready", "stopping", "failed"])
def test_readiness(fake: tuple[str, FakeEngine], status: str):
    url, engine = fake
    engine.status, engine.detail = status, "How it is"
    answer = httpx.get(f"{url}/readyz")
    assert answer.status_code == (200 if status == "ready" else 503)
    assert answer.json() == {"status": status, "detail": "How it is"}
