"""The replicas of one model, and the choice among them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence

import grpc

from cluster.core.block_hash import block_hashes
from cluster.core.prefix_index import block_name
from cluster.core.request import Priority
from cluster.core.router import Router
from cluster.core.routing import Placement
from cluster.core.routing_config import RoutingConfig
from cluster.errors import InvalidRequest, ModelWarming
from cluster.gateway.replica_link import ReplicaAddress, ReplicaLink, short_fingerprint
from cluster.v1 import inference_pb2, replica_pb2

logger = logging.getLogger(__name__)


class Balancer:
    """Holds a link to each replica of a model, and says which of them takes a request, and when.

    Args:
        secret: what replicas ask for.
        on_change: called when ``ready`` may have changed.
        config: how requests are spread.
        credentials: of TLS to the replicas; None: no TLS.
    """

    def __init__(
        self,
        model: str,
        *,
        gateway_id: str,
        secret: str,
        on_change: Callable[[], None],
        config: RoutingConfig | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.model = model
        self._gateway_id = gateway_id
        self._secret = secret
        self._credentials = credentials
        self._on_change = on_change
        self._links: dict[str, ReplicaLink] = {}
        self._router = Router(config or RoutingConfig(), random.Random())
        self._on_room: list[Callable[[], None]] = []
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
                self._router.outliers.forget(replica_id)
                link.retire()
                self._retired.append(link)
        for replica_id, replica in wanted.items():
            if replica_id not in self._links:
                self._links[replica_id] = ReplicaLink(
                    replica,
                    model=self.model,
                    gateway_id=self._gateway_id,
                    secret=self._secret,
                    credentials=self._credentials,
                    on_change=self._changed,
                    on_room=self._room,
                    on_outcome=self._note,
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
            replicas=[
                link.status(ejected=self._router.outliers.is_ejected(replica_id))
                for replica_id, link in self._links.items()
            ],
        )

    @property
    def num_gateways(self) -> int:
        """That have streams to the replicas, this one included; as the replicas say."""
        return max((link.load.num_gateways for link in self._links.values() if link.connected), default=1) or 1

    @property
    def tokens_per_s(self) -> float | None:
        """This gateway's part of what the replicas say they compute; None: they have not measured it."""
        total = sum(link.load.tokens_per_s for link in self._ready_links())
        return total / self.num_gateways if total > 0 else None

    # -- the choice ---------------------------------------------------------------------------------------------------

    def block_hashes(self, token_ids: Sequence[int], cache_salt: str = "") -> tuple[int, ...]:
        """What a prompt's blocks are called, for Placement; empty where no replica says what it has cached."""
        hello = self._hello
        if hello is None or not hello.advertises_blocks or not hello.block_size:
            return ()
        return tuple(map(block_name, block_hashes(token_ids, hello.block_size, cache_salt.encode())))

    def pick(
        self,
        placement: Placement,
        *,
        excluded: Collection[ReplicaLink] = (),
        only_digest: str | None = None,
        prefer: replica_pb2.Fingerprint | None = None,
    ) -> ReplicaLink:
        """The link for a request, which is then sent there.

        Args:
            excluded: where it does not go.
            only_digest: only to replicas of this model digest.
            prefer: replicas of this fingerprint go first.

        Raises:
            ModelWarming: there is no such replica that is ready.
        """
        replica_id = self._router.pick(
            placement,
            [link.snapshot(placement) for link in self._ready_links() if link not in excluded],
            now=time.monotonic(),
            only_digest=only_digest,
            prefer=None if prefer is None else short_fingerprint(prefer),
        )
        if replica_id is None:
            raise self._warming()
        return self._links[replica_id]

    def has_room(self, priority: Priority) -> bool:
        """Whether some replica may be given one more request of this class now: what was sent there and has not begun
        is less than its window, or none of it is of this class, so that no class waits behind others' windows.
        """
        links = self._ready_links()
        links = [link for link in links if not self._router.outliers.is_ejected(link.replica.replica_id)] or links
        longest_s = max((link.ready_s for link in links), default=0.0)
        return any(link.has_room(priority, self._router.weight(link.ready_s, longest_s)) for link in links)

    def on_room(self, callback: Callable[[], None]) -> None:
        """Calls back whenever there may be room that there was not; on the event loop."""
        self._on_room.append(callback)

    def predicted_ttft_s(self, placement: Placement) -> float | None:
        """Until the first token of a request that is sent now, in seconds, where it would come soonest; what waits in
        the gateway is not in it. None: not known."""
        snapshots = [link.snapshot(placement) for link in self._ready_links()]
        return self._router.predict_ttft_s(placement, snapshots)

    # -- what an operator or another gateway's client asks for ---------------------------------------------------------

    def drain(self, replica_id: str, timeout_s: float | None = None) -> int:
        """Gives a replica no new work; how many requests run there. What still does after ``timeout_s`` goes on
        elsewhere; None: it may finish.

        Raises:
            InvalidRequest: there is no such replica.
        """
        link = self._named(replica_id)
        link.held = True
        self._changed()
        if timeout_s is not None:
            asyncio.get_running_loop().call_later(timeout_s, self._hand_back, link)
        return link.num_submissions

    def undrain(self, replica_id: str) -> None:
        """Takes it back into service.

        Raises:
            InvalidRequest: there is no such replica.
        """
        self._named(replica_id).held = False
        self._changed()

    async def cancel_by_name(self, generation_id: str) -> bool:
        """Ends a generation that another gateway has submitted; False where no replica runs it."""
        answers = [link.cancel_by_name(generation_id) for link in (*self._links.values(), *self._retired)]
        return any(await asyncio.gather(*answers))

    def _named(self, replica_id: str) -> ReplicaLink:
        if replica_id not in self._links:
            names = ", ".join(sorted(self._links)) or "none"
            raise InvalidRequest(
                f"model {self.model!r} has no replica {replica_id!r}; it has {names}", field="replica_id"
            )
        return self._links[replica_id]

    def _hand_back(self, link: ReplicaLink) -> None:
        if link.held:
            link.hand_back("the replica was drained")

    # -- waiting ------------------------------------------------------------------------------------------------------

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
        self._room()

    def _room(self) -> None:
        for callback in self._on_room:
            callback()

    def _ready_links(self) -> list[ReplicaLink]:
        return [link for link in self._links.values() if link.ready]

    def _note(self, link: ReplicaLink, ok: bool | None) -> None:
        replica_id, outliers = link.replica.replica_id, self._router.outliers
        if self._links.get(replica_id) is not link:
            return
        if ok is None:
            outliers.unsent(replica_id)
            return
        was_ejected = outliers.is_ejected(replica_id)
        outliers.record(replica_id, ok, time.monotonic(), len(self._links))
        if outliers.is_ejected(replica_id) != was_ejected:
            logger.warning("replica %s %s", replica_id, "is back in service" if was_ejected else "fails: it is ejected")

    async def close(self) -> None:
        """Closes every link; what runs on them is lost."""
        links = [*self._links.values(), *self._retired]
        self._links.clear()
        self._retired.clear()
        await asyncio.gather(*(link.close() for link in links))
