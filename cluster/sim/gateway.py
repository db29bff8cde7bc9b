"""Who sends arrivals to replicas: at once, or as a gateway does that queues, routes and hears of steps."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

from cluster.core.prefix_cache import CacheChanges
from cluster.core.prefix_index import block_name
from cluster.core.replica_view import ReplicaView
from cluster.core.router import Router
from cluster.core.routing import LeastTokens, Placement, ReplicaSnapshot
from cluster.core.routing_config import RoutingConfig
from cluster.sim.advertising_replica import AdvertisingReplica
from cluster.sim.replica import Replica
from cluster.sim.workload import Arrival


class Dispatch(Protocol):
    """Takes arrivals and says when each goes where."""

    def arrive(self, request_id: int, arrival: Arrival) -> None: ...

    def next(self, now: float) -> tuple[int, Replica | None] | None:
        """A request that goes to a replica now, or is refused where that is None; None: no request does. The caller
        adds it there before it asks again."""

    def hear(self, replica: Replica, sampled: Sequence[int]) -> None:
        """A step has ended, by which these requests got a token."""

    def forget(self, request_id: int) -> None:
        """It has ended, wherever it was."""

    def lose(self, replica: Replica) -> None:
        """The replica has crashed."""


class AtOnce:
    """Each request where the least tokens are outstanding, when it comes; refused where no replica is up.

    Args:
        rng: breaks ties.
    """

    def __init__(self, replicas: Sequence[Replica], rng: random.Random) -> None:
        self._replicas = {replica.replica_id: replica for replica in replicas}
        self._policy = LeastTokens(rng)
        self._arrived: deque[tuple[int, Arrival]] = deque()

    def arrive(self, request_id: int, arrival: Arrival) -> None:
        self._arrived.append((request_id, arrival))

    def next(self, now: float) -> tuple[int, Replica | None] | None:
        if not self._arrived:
            return None
        request_id, arrival = self._arrived.popleft()
        snapshots = [
            ReplicaSnapshot(replica_id=name, ready=True, outstanding_tokens=replica.outstanding_tokens)
            for name, replica in self._replicas.items()
            if replica.is_up
        ]
        if not snapshots:
            return request_id, None
        placement = Placement(num_prompt_tokens=arrival.num_prompt_tokens, max_tokens=arrival.num_output_tokens)
        return request_id, self._replicas[self._policy.pick(placement, snapshots).replica_id]

    def hear(self, replica: Replica, sampled: Sequence[int]) -> None:
        pass

    def forget(self, request_id: int) -> None:
        pass

    def lose(self, replica: Replica) -> None:
        pass


class QueueingGateway:
    """A gateway as it runs in production: first come first served until a replica has room, then where the router says.

    It knows what one would: what it has sent, and what replicas say at the end of each step, nothing between.

    Args:
        rng: breaks ties.
    """

    def __init__(self, replicas: Sequence[AdvertisingReplica], config: RoutingConfig, rng: random.Random) -> None:
        self._replicas = {replica.replica_id: replica for replica in replicas}
        self._views = {replica.replica_id: _view(replica) for replica in replicas}
        self._router = Router(config, rng)
        self._queue: dict[int, Placement] = {}
        self._homes: dict[int, tuple[str, int]] = {}  # of what was sent, with the tokens of prompt and completion
        self._outstanding_tokens = Counter[str]()

    def arrive(self, request_id: int, arrival: Arrival) -> None:
        self._queue[request_id] = Placement(
            num_prompt_tokens=arrival.num_prompt_tokens,
            max_tokens=arrival.num_output_tokens,
            priority=arrival.priority,
            block_hashes=tuple(map(block_name, arrival.block_hashes)),
        )

    def next(self, now: float) -> tuple[int, Replica | None] | None:
        if not self._queue:
            return None
        request_id, placement = next(iter(self._queue.items()))
        up = [replica for replica in self._replicas.values() if replica.is_up]
        if not any(self._views[replica.replica_id].has_room(placement.priority) for replica in up):
            return None
        snapshots = [
            self._views[replica.replica_id].snapshot(
                placement, outstanding_tokens=self._outstanding_tokens[replica.replica_id], ready=True
            )
            for replica in up
        ]
        replica_id = self._router.pick(placement, snapshots, now=now)
        if replica_id is None:
            return None
        del self._queue[request_id]
        num_tokens = placement.num_prompt_tokens + placement.max_tokens
        self._homes[request_id] = replica_id, num_tokens
        self._outstanding_tokens[replica_id] += num_tokens
        self._views[replica_id].send(request_id, placement)
        return request_id, self._replicas[replica_id]

    def hear(self, replica: Replica, sampled: Sequence[int]) -> None:
        self.learn(replica.replica_id, self._replicas[replica.replica_id].take_cache_changes(), sampled)

    def learn(self, replica_id: str, changes: CacheChanges, sampled: Sequence[int]) -> None:
        """What a step has changed, where somebody else has asked the replica: there are several gateways."""
        replica, view = self._replicas[replica_id], self._views[replica_id]
        view.hear_of_blocks(reset=False, added=changes.added, removed=changes.removed)
        for request_id in sampled:
            view.begin(request_id)
        view.queued_tokens = replica.queued_tokens
        view.step_s, view.prompt_token_s = replica.pace.step_s, replica.pace.prompt_token_s

    def forget(self, request_id: int) -> None:
        self._queue.pop(request_id, None)
        if request_id in self._homes:
            replica_id, num_tokens = self._homes.pop(request_id)
            self._outstanding_tokens[replica_id] -= num_tokens
            self._views[replica_id].begin(request_id)

    def lose(self, replica: Replica) -> None:
        self._views[replica.replica_id] = _view(self._replicas[replica.replica_id])


def _view(replica: AdvertisingReplica) -> ReplicaView:
    return ReplicaView(
        replica.replica_id,
        block_size=replica.block_size,
        max_num_batched_tokens=replica.config.max_num_batched_tokens,
    )
