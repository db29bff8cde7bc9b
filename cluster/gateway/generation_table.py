"""The generations that this gateway knows: those that run, and those that ended lately."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass

from cluster.errors import AlreadyExists, Cancelled, Draining, GenerationNotFound, Overloaded
from cluster.gateway.generation import Generation
from cluster.gateway.reader import Reader
from cluster.gateway.replay import ReplayConfig, ReplayWindow
from cluster.observability.metrics import MetricSink

_MAX_ENDED = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestKey:
    """Who asks for what, by which the same request is known again.

    Attributes:
        tenant: names of one tenant mean nothing to another.
        request_id: the client's; may be empty.
        generation_id: of the generation that the request goes on with; empty: none.
        digest: of the request's body.
    """

    tenant: str
    request_id: str
    generation_id: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    generation: Generation
    tenant: str
    request_id: str
    digest: bytes


class GenerationTable:
    """Opens, finds and closes generations. An entry is made once and removed once, with its last reader.

    Args:
        max_open: calls that may be open; more are refused.
        replay: what is kept of those that ended.
    """

    def __init__(self, *, max_open: int, replay: ReplayConfig, metrics: MetricSink) -> None:
        self.draining = False
        self._max_open = max_open
        self._metrics = metrics
        self._num_calls = 0
        self._by_id: dict[str, _Entry] = {}
        self._by_request_id: dict[tuple[str, str], _Entry] = {}
        self._replay: ReplayWindow[_Entry] = ReplayWindow(replay)
        # Names of the latest that ended: a late cancel of one of them is no mistake of the client's.
        self._ended: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._by_id)

    def open(self, key: RequestKey) -> tuple[Generation, bool]:
        """The generation of a call, and whether it is a new one: the call's own to start. ``close`` ends the call.

        Raises:
            Draining: the gateway is going away.
            Overloaded: too many calls are open.
            AlreadyExists: its name is another request's.
        """
        if self.draining:
            raise Draining("the gateway is shutting down; nothing was executed")
        if self._num_calls >= self._max_open:
            raise Overloaded(f"{self._max_open} generations are open already; try again")
        entry = self._find(key)
        is_new = entry is None
        if entry is None:
            entry = self._create(key)
        self._num_calls += 1
        self._empty.clear()
        return entry.generation, is_new

    def _find(self, key: RequestKey) -> _Entry | None:
        entry = None
        if key.request_id:
            name = (key.tenant, key.request_id)
            entry = self._by_request_id.get(name) or self._replay.get(name)
            if entry is not None and entry.digest != key.digest:
                raise AlreadyExists(
                    f"another request has the request_id {key.request_id!r}; draw a new one for each request",
                    field="request_id",
                )
        if entry is None and key.generation_id:
            entry = self._by_id.get(key.generation_id)
            if entry is not None and (entry.tenant, entry.digest) != (key.tenant, key.digest):
                raise AlreadyExists(
                    f"another request has the generation_id {key.generation_id!r}", field="resume.generation_id"
                )
        # One that has failed, and whose readers are about to go, is nothing to join.
        return None if entry is None or entry.generation.error is not None else entry

    def _create(self, key: RequestKey) -> _Entry:
        generation_id = key.generation_id
        if not generation_id or generation_id in self._by_id:
            generation_id = f"gen-{secrets.token_hex(12)}"
        generation = Generation(generation_id, metrics=self._metrics)
        entry = _Entry(generation, key.tenant, key.request_id or generation_id, key.digest)
        self._by_id[generation_id] = self._by_request_id[key.tenant, entry.request_id] = entry
        return entry

    def close(self, generation: Generation, reader: Reader) -> bool:
        """A call has ended. With its last reader a generation ends, too; whether that was it."""
        self._num_calls -= 1
        if not self._num_calls:
            self._empty.set()
        generation.detach(reader)
        entry = self._by_id.get(generation.generation_id)
        if generation.num_readers or entry is None or entry.generation is not generation:
            return False
        name = (entry.tenant, entry.request_id)
        del self._by_id[generation.generation_id]
        if self._by_request_id.get(name) is entry:
            del self._by_request_id[name]
        if entry.request_id != generation.generation_id and generation.complete and generation.error is None:
            self._replay.put(name, entry, generation.num_bytes)
        for ended in (name, (entry.tenant, generation.generation_id)):
            self._ended[ended] = None
            self._ended.move_to_end(ended)
        while len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)
        return True

    def cancel(self, name: str, tenant: str) -> bool:
        """Cancels by generation or request id; False: it had ended.

        Raises:
            GenerationNotFound: no such id of this tenant's, now or lately.
        """
        entry = self._by_id.get(name)
        if entry is None or entry.tenant != tenant:
            entry = self._by_request_id.get((tenant, name))
        if entry is not None:
            entry.generation.fail(Cancelled("cancelled by CancelGeneration"))
            return True
        if (tenant, name) in self._ended:
            return False
        raise GenerationNotFound(f"no generation {name!r} is known here", field="generation_id")

    async def wait_empty(self) -> None:
        await self._empty.wait()
