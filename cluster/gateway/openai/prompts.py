"""The prompts of one HTTP request, each on the one path, read together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cluster.gateway.reader import Reader
from cluster.gateway.request_path import RequestPath
from cluster.v1 import inference_pb2

T = TypeVar("T")
# Takes the number of the prompt, its reader and a chunk of it.
OnChunk = Callable[[int, Reader, inference_pb2.GenerateChunk], Awaitable[None]]


@dataclass(frozen=True)
class Whole:
    """A prompt's answer, and where its time went."""

    reader: Reader
    response: inference_pb2.GenerateResponse
    ledger: inference_pb2.Ledger


async def read_whole(path: RequestPath, requests: Sequence[inference_pb2.GenerateRequest]) -> list[Whole]:
    """All answers. Where one request fails the others are ended.

    Raises:
        ClusterError: the first that one failed with.
    """

    async def read(request: inference_pb2.GenerateRequest) -> Whole:
        async with path.run(request, remaining_s=None, streams=False) as reader:
            return Whole(reader, await reader.response(), reader.ledger())

    if len(requests) == 1:
        return [await read(requests[0])]
    return await _all([read(request) for request in requests])


async def read_chunks(path: RequestPath, requests: Sequence[inference_pb2.GenerateRequest], on_chunk: OnChunk) -> None:
    """Hands over the chunks as they come, one at a time. Where one request fails the others are ended.

    Raises:
        Exception: the first that a request failed with, or ``on_chunk``.
    """
    one_at_a_time = asyncio.Lock()

    async def read(prompt: int, request: inference_pb2.GenerateRequest) -> None:
        async with path.run(request, remaining_s=None, streams=True) as reader:
            async for chunk in reader:
                async with one_at_a_time:  # what has to wait stays with its generation, which bounds it
                    await on_chunk(prompt, reader, chunk)

    if len(requests) == 1:
        await read(0, requests[0])
        return
    await _all([read(*numbered) for numbered in enumerate(requests)])


async def _all(coroutines: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """Their results; where one raises, the others are cancelled first."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
