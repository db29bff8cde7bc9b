"""A server that speaks OpenAI's completions over HTTP, ours or another."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp

from cluster.bench.serve.target import Answer, TargetFailure, TargetModel
from cluster.client.credentials import Credentials
from cluster.core.request import Priority
from cluster.errors import ConfigError, ServerUnreachable

_MAX_EVENT_BYTES = 2**22


class OpenAITarget:
    """Streams ``/v1/completions`` with token ids as prompts.

    Lengths are exact where the server knows ``ignore_eos`` and ``min_tokens``, which OpenAI's own does not. How many
    tokens a message holds is not told, so each counts as one until the usage at the end.

    Args:
        url: ``"http://host:port"``, with or without ``/v1``.
        model: may be empty where one model is served.

    Raises:
        ConfigError: a credential cannot be read.
    """

    def __init__(self, url: str, model: str, credentials: Credentials) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = model
        self._session = aiohttp.ClientSession(
            headers=dict(credentials.metadata()),
            connector=aiohttp.TCPConnector(limit=0, ssl=_ssl_context(credentials)),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_MAX_EVENT_BYTES,
        )

    async def model(self) -> TargetModel:
        try:
            async with self._session.get(f"{self._url}/models", timeout=aiohttp.ClientTimeout(total=30)) as response:
                body = await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ServerUnreachable(f"{self._url}/models does not answer as OpenAI's API does: {error!r}") from None
        names = [model["id"] for model in body.get("data", ())]
        found = [name for name in names if self._model in ("", name)]
        if len(found) != 1:
            raise ConfigError(f"name one of the models of {self._url}: {', '.join(names) or 'none'}", field="model")
        self._model = found[0]
        return TargetModel(name=self._model)

    async def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        priority: Priority,
        seed: int,
        deadline_s: float,
        on_tokens: Callable[[int], None],
    ) -> Answer:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "min_tokens": max_tokens,
            "ignore_eos": True,
            "seed": seed,
            "priority": int(priority),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage: dict[str, Any] = {}
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._session.post(f"{self._url}/completions", json=body) as response,
            ):
                if response.status != 200:
                    raise await _refusal(response)
                async for event in _events(response):
                    if "error" in event:
                        raise TargetFailure(f"error event ({event['error'].get('code')})")
                    if event.get("choices"):
                        on_tokens(1)
                    usage = event.get("usage") or usage
        except TimeoutError:
            raise TargetFailure("DEADLINE_EXCEEDED (client)") from None
        except (aiohttp.ClientError, ValueError) as error:
            raise TargetFailure(f"connection ({type(error).__name__})") from None
        details = usage.get("prompt_tokens_details") or {}
        return Answer(num_new_tokens=usage.get("completion_tokens"), cached_tokens=details.get("cached_tokens") or 0)

    async def close(self) -> None:
        await self._session.close()


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Of the stream, up to its end.

    Raises:
        TargetFailure: it broke off.
    """
    async for line in response.content:
        name, _, data = line.strip().partition(b":")
        if name != b"data":
            continue
        if data.strip() == b"[DONE]":
            return
        yield json.loads(data)
    raise TargetFailure("connection (the stream broke off)")


async def _refusal(response: aiohttp.ClientResponse) -> TargetFailure:
    try:
        cause = (await response.json())["error"]["code"]
    except (aiohttp.ClientError, ValueError, KeyError, TypeError):
        cause = response.reason
    try:
        retry_after_s = float(response.headers.get("retry-after", ""))
    except ValueError:
        retry_after_s = None
    return TargetFailure(f"HTTP {response.status} ({cause})", retry_after_s=retry_after_s)


def _ssl_context(credentials: Credentials) -> ssl.SSLContext | bool:
    if not credentials.tls:
        return True
    try:
        context = ssl.create_default_context(cafile=credentials.ca_file)
        if credentials.cert_file is not None:
            context.load_cert_chain(credentials.cert_file, credentials.key_file)
    except OSError as error:
        raise ConfigError(f"a certificate cannot be read: {error}") from None
    return context
