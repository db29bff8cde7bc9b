"""The replicas of one model, and the choice among them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence

from cluster.core.routing import LeastTokens, ReplicaSnapshot
from cluster.errors import ModelWarming
from cluster.gateway.replica_link import ReplicaAddress, ReplicaLink
from cluster.v1 import inference_pb2, replica_pb2


class Balancer:
    """Holds a link to each replica of a model; sends each request to the ready one with the least outstanding tokens.

    Args:
        on_change: called when ``ready`` may have changed.
    """

    def __init__(self, model: str, *, gateway_id: str, secret: str, on_change: Callable[[], None]) -> None:
        self.model = model
        self._gateway_id = gateway_id
        self._secret = secret
        self._on_change = on_change
        self._links: dict[str, ReplicaLink] = {}
        self._policy = LeastTokens(random.Random())
        self._retired: list[ReplicaLink] = []
        self._waiting: list[Callable[[], None]] = []
        self._hello: replica_pb2.ReplicaHello | None = None

    def set_replicas(self, replicas: Sequence[ReplicaAddress]) -> None:
        """Links to new ones; those that are gone get no new work, and their links close when what runs has finished.

        A replica that comes back under its old name at another address is a new one.
        """
        wanted = {replica.replica_id: replica for replica in replicas}
        for replica_id, link in list(self._links.items()):
            if wanted.get(replica_id) != link.replica:
                del self._links[replica_id]
                link.retire()
                self._retired.append(link)
        for replica_id, replica in wanted.items():
            if replica_id not in self._links:
                self._links[replica_id] = ReplicaLink(
                    replica,
                    model=self.model,
                    gateway_id=self._gateway_id,
                    secret=self._secret,
                    on_change=self._changed,
                )
        self._changed()

    @property
    def ready(self) -> bool:
        """Whether any replica takes work."""
        return any(link.ready for link in self._links.values())

    def hello(self) -> replica_pb2.ReplicaHello:
        """What the model's replicas say of it; kept when they go.

        Raises:
            ModelWarming: none has ever been met.
        """
        if self._hello is None:
            raise self._warming()
        return self._hello

    def describe(self) -> inference_pb2.Model:
        """The model and its replicas as clients see them."""
        hello = self._hello or replica_pb2.ReplicaHello()
        return inference_pb2.Model(
            name=self.model,
            architecture=hello.architecture,
            max_model_len=hello.max_model_len,
            vocab_size=hello.vocab_size,
            dtype=hello.dtype,
            replicas=[link.status() for link in self._links.values()],
        )

    def pick(self, *, excluded: Collection[ReplicaLink] = ()) -> ReplicaLink:
        """The link for the next request.

        Raises:
            ModelWarming: no replica is ready, apart from the excluded ones.
        """
        replica_id = self._policy.pick(
            ReplicaSnapshot(replica_id=replica_id, ready=link.ready, outstanding_tokens=link.outstanding_tokens)
            for replica_id, link in self._links.items()
            if link not in excluded
        )
        if replica_id is None:
            raise self._warming()
        return self._links[replica_id]

    def wait_ready(self, callback: Callable[[], None]) -> None:
        """Calls back, once, when a replica is ready; on the event loop, never from inside this call."""
        self._waiting.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """Takes back a ``wait_ready``; nothing happens where there is none."""
        if callback in self._waiting:
            self._waiting.remove(callback)

    def _warming(self) -> ModelWarming:
        return ModelWarming(f"model {self.model!r} has no ready replica; nothing was executed")

    def _changed(self) -> None:
        self._retired = [link for link in self._retired if not link.closed]
        for link in self._links.values():
            if link.ready:
                self._hello = link.hello
        self._on_change()
        if self._waiting and self.ready:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()

    async def close(self) -> None:
        """Closes every link; what runs on them is lost."""
        links = [*self._links.values(), *self._retired]
        self._links.clear()
        self._retired.clear()
        await asyncio.gather(*(link.close() for link in links))
