"""Gateways in front of replicas in virtual time: the admission queue, the window and the scheduler of production."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from sim_setup import create_step_times

from cluster.core.admission import AdmissionQueue
from cluster.core.block_manager import BlockManager
from cluster.core.config import AdmissionConfig, ClassesConfig, SchedulerConfig
from cluster.core.fair_queue import QueuedRequest
from cluster.core.request import Priority, Request
from cluster.core.routing import Placement
from cluster.core.scheduler import Scheduler
from cluster.core.token_estimate import CompletionLength
from cluster.core.unstarted_work import UnstartedWork
from cluster.errors import Overloaded
from cluster.sim.events import EventQueue
from cluster.sim.replica import Replica

MAX_NUM_BATCHED_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """Requests that one tenant sends to one gateway at a rate, each as if it asked for ``max_tokens`` and stopped after
    ``num_output_tokens``."""

    priority: Priority
    rate: float
    tenant: str = ""
    gateway: int = 0
    num_prompt_tokens: int = 48
    num_output_tokens: int = 16
    max_tokens: int = 16
    from_s: float = 0.0


@dataclass(slots=True)
class Sent:
    """A request, from its arrival to its end."""

    flow: Flow
    arrived_s: float
    queued: QueuedRequest | None = None
    replica: int = -1
    num_sampled: int = 0
    first_token_s: float | None = None


class GatewaySim:
    """Runs flows for a time.

    Attributes:
        computed: tokens that replicas have computed from ``count_from_s`` on, by flow.
        ttfts_s: of requests that came from then on, by flow.
        refused: by flow.
    """

    def __init__(
        self,
        *,
        num_gateways: int = 1,
        num_replicas: int = 1,
        count_from_s: float = 0.0,
        classes: ClassesConfig | None = None,
        seed: int = 0,
        **bounds: int,
    ) -> None:
        classes = classes or ClassesConfig()
        self.computed: Counter[Flow] = Counter()
        self.ttfts_s: dict[Flow, list[float]] = {}
        self.refused: Counter[Flow] = Counter()
        self._count_from_s = count_from_s
        self._rng = random.Random(seed)
        self._events = EventQueue()
        config = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS)
        self._replicas = [
            Replica(str(i), lambda: Scheduler(config, BlockManager(1024, 16), classes=classes), create_step_times())
            for i in range(num_replicas)
        ]
        self.queues = [AdmissionQueue(AdmissionConfig(**bounds), classes) for _ in range(num_gateways)]
        self._unstarted = [[UnstartedWork() for _ in self._replicas] for _ in self.queues]
        self._completions = {priority: CompletionLength() for priority in Priority}
        self._sent: dict[int, Sent] = {}
        self._by_queued: dict[QueuedRequest, int] = {}
        self._until_s = 0.0

    def run(self, *flows: Flow, until_s: float) -> None:
        self._until_s = until_s
        numbers = iter(range(10**9))
        for flow in flows:
            self._expect(flow, numbers, flow.from_s)
        self._events.run()
        for queue in self.queues:
            queue.check_integrity()
            assert len(queue) == 0, "requests wait though nobody is served any more"
        assert not self._sent, "requests that never ended"

    def shares(self, *flows: Flow) -> list[float]:
        total = sum(self.computed[flow] for flow in flows)
        return [self.computed[flow] / total for flow in flows]

    def _expect(self, flow: Flow, numbers: Iterator[int], at_s: float) -> None:
        at_s += self._rng.expovariate(flow.rate)
        if at_s < self._until_s:
            self._events.add(at_s, partial(self._arrive, flow, numbers))

    def _arrive(self, flow: Flow, numbers: Iterator[int]) -> None:
        now, number = self._events.now, next(numbers)
        self._expect(flow, numbers, now)
        queue = self.queues[flow.gateway]
        expected = self._completions[flow.priority].expected(flow.max_tokens, 1)
        try:
            queued, pushed_out = queue.add(
                now=now, priority=flow.priority, tenant=flow.tenant, num_tokens=flow.num_prompt_tokens + expected
            )
        except Overloaded:
            self.refused[flow] += 1
            return
        for other in pushed_out:
            self.refused[self._sent.pop(self._by_queued.pop(other)).flow] += 1
        self._sent[number] = Sent(flow, now, queued)
        self._by_queued[queued] = number
        queue.make_ready(queued, now)
        self._place(flow.gateway)

    def _place(self, gateway: int) -> None:
        """Sends as long as there is room, each to the replica with the least that it has sent and has not begun."""
        queue, unstarted = self.queues[gateway], self._unstarted[gateway]

        def has_room(priority: Priority) -> bool:
            return any(work.has_room(priority, 2 * MAX_NUM_BATCHED_TOKENS) for work in unstarted)

        while (queued := queue.pop(self._events.now, has_room)) is not None:
            number = self._by_queued.pop(queued)
            sent = self._sent[number]
            flow = sent.flow
            sent.replica = min(range(len(unstarted)), key=lambda i: (unstarted[i].num_uncached_tokens, i))
            placement = Placement(
                num_prompt_tokens=flow.num_prompt_tokens, max_tokens=flow.max_tokens, priority=flow.priority
            )
            unstarted[sent.replica].add(number, placement, 0)
            replica = self._replicas[sent.replica]
            replica.add(
                Request(
                    request_id=number,
                    num_prompt_tokens=flow.num_prompt_tokens,
                    max_tokens=flow.num_output_tokens,
                    priority=flow.priority,
                    arrival=self._events.now,
                )
            )
            if replica.step is None:
                self._begin(sent.replica)

    def _begin(self, index: int) -> None:
        replica = self._replicas[index]
        replica.begin(self._events.now)
        if replica.step is None:
            return
        if self._count_from_s <= self._events.now < self._until_s:
            for share in replica.step.schedule.scheduled:
                self.computed[self._sent[share.sequence_id].flow] += share.num_new_tokens
        self._events.add(self._events.now + replica.step.duration_s, partial(self._finish, index))

    def _finish(self, index: int) -> None:
        now = self._events.now
        sampled, ended = self._replicas[index].finish()
        for number in sampled:
            sent = self._sent[number]
            if sent.first_token_s is None:
                sent.first_token_s = now
                self._unstarted[sent.flow.gateway][index].remove(number)
                if sent.arrived_s >= self._count_from_s:
                    self.ttfts_s.setdefault(sent.flow, []).append(now - sent.arrived_s)
        for number in ended:
            sent = self._sent.pop(number)
            flow = sent.flow
            self._completions[flow.priority].observe(flow.num_output_tokens, 1, now - sent.arrived_s)
            self.queues[flow.gateway].settle(sent.queued, flow.num_prompt_tokens + flow.num_output_tokens)
        for gateway in range(len(self.queues)):
            self._place(gateway)
        if self._replicas[index].step is None:
            self._begin(index)
