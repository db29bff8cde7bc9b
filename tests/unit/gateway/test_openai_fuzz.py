"""Whatever body comes in over HTTP, the answer is one that makes sense. CLUSTER_TEST_FULL=1 tries ten times as much."""

from __future__ import annotations

import asyncio
import json
import os
import random
from typing import Any

import aiohttp
import msgspec
from fake_replica import FakeReplica
from gateway_setup import CreateSetup

from cluster.gateway.openai.schema import ChatBody, CompletionBody

NUM_CASES = 10_000 if os.environ.get("CLUSTER_TEST_FULL") == "1" else 1000
BATCH = 50  # at once
# 404: a model that is not there; 429: a max_ttft_ms that nobody can keep.
ALLOWED = {200, 400, 404, 429}
VALUES = (
    None, True, False, 0, 1, 2, 5, -1, 17, 2**31, 2**63, 2**64, 2**70, 0.0, 0.5, -2.5, 1e308, "", "a", "é\U0001f642",
    "\0", "x" * 600, "test", "P0", "auto", [], [""], ["a", "b"], [1, 2], [[1], [2]], [[]], {}, {"1": 1}, {"a": None},
    {"include_usage": True}, [{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type": "text"}]}],
)  # fmt: skip


def random_body(rng: random.Random, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Mostly sound: only so does it get past the first check."""
    body: dict[str, Any] = {"max_tokens": rng.choice((1, 3, 8)), "stream": rng.random() < 0.5}
    if kind is ChatBody:
        body["messages"] = [{"role": "user", "content": "hi"}]
    else:
        body["prompt"] = rng.choice(("hi", ["a", "b"], [65, 66]))
    fields = [field.name for field in msgspec.structs.fields(kind)]
    for name in rng.sample(fields, rng.choice((0, 1, 1, 2, 3))):
        body[name] = rng.choice(VALUES)
    if rng.random() < 0.05:
        body[rng.choice(("unknown", "", "é"))] = rng.choice(VALUES)
    return body


def damaged(rng: random.Random, data: bytes) -> bytes:
    """With some bytes changed, cut out or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(changed))
        match rng.randrange(3):
            case 0:
                changed[place] = rng.randrange(256)
            case 1:
                del changed[place : place + rng.randrange(1, 8)]
            case 2:
                changed[place:place] = rng.randbytes(rng.randrange(1, 8))
        changed = changed or bytearray(b"{")
    return bytes(changed)


async def test_bodies(create_setup: CreateSetup) -> None:
    setup, rng = await create_setup(FakeReplica(), http_port=0), random.Random(20261121)
    statuses = []

    async def send(session: aiohttp.ClientSession, path: str, data: bytes) -> None:
        headers = {"content-type": "application/json"}
        async with session.post(path, data=data, headers=headers) as response:
            text = await response.text()
        assert response.status in ALLOWED, f"{response.status} for {path}: {data!r}: {text}"
        statuses.append(response.status)
        if response.content_type == "text/event-stream":
            assert text.endswith("data: [DONE]\n\n"), f"{path}: {data!r}: {text}"
        else:
            answer = json.loads(text)
            assert ("choices" in answer) == (response.status == 200)
            assert ("error" in answer) == (response.status != 200)

    async with aiohttp.ClientSession(f"http://127.0.0.1:{setup.gateway.http_port}") as session:
        for _ in range(NUM_CASES // BATCH):
            cases = []
            for _ in range(BATCH):
                path, kind = rng.choice((("/v1/completions", CompletionBody), ("/v1/chat/completions", ChatBody)))
                data = json.dumps(random_body(rng, kind)).encode()
                cases.append((path, damaged(rng, data) if rng.random() < 0.2 else data))
            await asyncio.gather(*(send(session, *case) for case in cases))
    assert statuses.count(200) > NUM_CASES / 5
    assert statuses.count(400) > NUM_CASES / 5
