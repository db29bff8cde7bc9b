"""The prompts of one HTTP request, each on the one path, read together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cluster.gateway.request_path import Reader, RequestPath
from cluster.v1 import inference_pb2

Item = tuple[int, Reader, inference_pb2.GenerateChunk]


async def read_whole(
    path: RequestPath, requests: Sequence[inference_pb2.GenerateRequest]
) -> list[tuple[Reader, inference_pb2.GenerateResponse]]:
    """All answers. Where one request fails the others are ended.

    Raises:
        ClusterError: the first that one failed with.
    """

    async def read(request: inference_pb2.GenerateRequest) -> tuple[Reader, inference_pb2.GenerateResponse]:
        async with path.run(request, remaining_s=None, streams=False) as reader:
            return reader, await reader.response()

    if len(requests) == 1:
        return [await read(requests[0])]
    async with _tasks([asyncio.create_task(read(request)) for request in requests]) as tasks:
        return await asyncio.gather(*tasks)


async def read_chunks(path: RequestPath, requests: Sequence[inference_pb2.GenerateRequest]) -> AsyncIterator[Item]:
    """Number of the prompt, its reader and a chunk of it, as they come. To be closed by who leaves it early.

    Raises:
        ClusterError: the first that one failed with; the others are ended.
    """
    if len(requests) == 1:
        async with path.run(requests[0], remaining_s=None, streams=True) as reader:
            async for chunk in reader:
                yield 0, reader, chunk
        return
    # What is not read stays with its generation, which bounds it.
    queue: asyncio.Queue[Item | Exception | None] = asyncio.Queue(maxsize=1)

    async def read(prompt: int, request: inference_pb2.GenerateRequest) -> None:
        try:
            async with path.run(request, remaining_s=None, streams=True) as reader:
                async for chunk in reader:
                    await queue.put((prompt, reader, chunk))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    async with _tasks([asyncio.create_task(read(*numbered)) for numbered in enumerate(requests)]) as tasks:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item


@asynccontextmanager
async def _tasks(tasks: list[asyncio.Task]) -> AsyncIterator[list[asyncio.Task]]:
    """Ended on leaving, whatever happened."""
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
