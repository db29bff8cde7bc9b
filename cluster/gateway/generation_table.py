"""The generations that are open in this gateway."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict

from cluster.errors import AlreadyExists, Cancelled, Draining, GenerationNotFound, Overloaded
from cluster.gateway.generation import Generation
from cluster.observability.metrics import MetricSink

_MAX_ENDED = 4096


class GenerationTable:
    """Opens, finds and closes generations. An entry is made once and removed once.

    Args:
        max_open: more at once are refused.
        max_unread_tokens: see Generation.
    """

    def __init__(self, *, max_open: int, max_unread_tokens: int, metrics: MetricSink) -> None:
        self.draining = False
        self._max_open = max_open
        self._max_unread_tokens = max_unread_tokens
        self._metrics = metrics
        self._by_id: dict[str, Generation] = {}
        self._by_request_id: dict[str, Generation] = {}
        # Names of the latest that ended: a late cancel of one of them is no mistake of the client's.
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._by_id)

    def open(self, request_id: str, *, streams: bool) -> Generation:
        """A new entry. ``request_id`` may be empty: then it is the generation's id.

        Raises:
            Draining: the gateway is going away.
            Overloaded: too many are open.
            AlreadyExists: ``request_id`` names an open one.
        """
        if self.draining:
            raise Draining("the gateway is shutting down; nothing was executed")
        if len(self._by_id) >= self._max_open:
            raise Overloaded(f"{self._max_open} generations are open already; try again")
        generation_id = f"gen-{secrets.token_hex(12)}"
        request_id = request_id or generation_id
        if request_id in self._by_request_id:
            raise AlreadyExists(f"a generation with request_id {request_id!r} is running", field="request_id")
        generation = Generation(
            generation_id,
            request_id,
            streams=streams,
            max_unread_tokens=self._max_unread_tokens,
            metrics=self._metrics,
        )
        self._by_id[generation_id] = self._by_request_id[request_id] = generation
        self._empty.clear()
        return generation

    def close(self, generation: Generation) -> None:
        """Removes the entry and ends what still runs."""
        del self._by_id[generation.generation_id]
        del self._by_request_id[generation.request_id]
        generation.close()
        for name in (generation.generation_id, generation.request_id):
            self._ended[name] = None
            self._ended.move_to_end(name)
        while len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)
        if not self._by_id:
            self._empty.set()

    def cancel(self, name: str) -> bool:
        """Cancels by generation or request id; False: it had ended.

        Raises:
            GenerationNotFound: no such id, now or lately.
        """
        generation = self._by_id.get(name) or self._by_request_id.get(name)
        if generation is not None:
            generation.fail(Cancelled("cancelled by CancelGeneration"))
            return True
        if name in self._ended:
            return False
        raise GenerationNotFound(f"no generation {name!r} is known here", field="generation_id")

    async def wait_empty(self) -> None:
        await self._empty.wait()
