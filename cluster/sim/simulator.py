"""Requests, replicas and faults in virtual time, around the scheduler that runs in production."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.core.request import Request
from cluster.errors import InvalidRequest, Overloaded
from cluster.sim.events import EventQueue
from cluster.sim.gateway import AtOnce, Dispatch
from cluster.sim.recording import Ending, Recording
from cluster.sim.replica import Replica, Step
from cluster.sim.workload import Arrival


@dataclass(frozen=True, kw_only=True, slots=True)
class Stall:
    """The replica's next step takes ``duration_s`` longer: a page fault, a noisy neighbour, a clock throttled."""

    at_s: float
    replica_index: int
    duration_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """The replica loses all it has; it comes back empty after ``down_s`` seconds."""

    at_s: float
    replica_index: int
    down_s: float


class Simulator:
    """Runs a workload over replicas. One run; the same arguments give the same run, event by event.

    A request goes to one replica and ends with it.

    Attributes:
        recording: what happened.
        num_steps: that replicas have done.

    Args:
        replicas: fresh ones.
        rng: breaks the ties of routing.
        dispatch: says what goes where; None: each request at once to the replica with the least outstanding tokens.
    """

    def __init__(self, replicas: Sequence[Replica], rng: random.Random, dispatch: Dispatch | None = None) -> None:
        self.recording = Recording()
        self.num_steps = 0
        self._replicas = replicas
        self._events = EventQueue()
        self._dispatch = dispatch or AtOnce(replicas, rng)
        self._homes: dict[int, Replica] = {}
        self._log = hashlib.sha256()

    @property
    def now(self) -> float:
        return self._events.now

    def run(self, arrivals: Iterable[Arrival], faults: Iterable[Stall | Crash] = ()) -> Recording:
        """Until every request has ended.

        Args:
            arrivals: in the order of their times.

        Raises:
            RuntimeError: an invariant is broken: the books of a scheduler do not balance, a request ended twice or
                never, a replica idles with work waiting.
        """
        for fault in faults:
            self._events.add(fault.at_s, partial(self._break, fault))
        self._expect(iter(arrivals))
        self._events.run()
        for replica in self._replicas:
            replica.check_integrity()
        self.recording.check_all_ended()
        return self.recording

    def digest(self) -> str:
        """Of all that happened and when, so that two runs can be told apart."""
        return self._log.hexdigest()

    def _expect(self, arrivals: Iterator[Arrival]) -> None:
        """Puts the next arrival in; it puts the one after it in, so that a trace is read as time goes."""
        arrival = next(arrivals, None)
        if arrival is not None:
            self._events.add(arrival.at_s, partial(self._arrive, arrival, arrivals))

    def _arrive(self, arrival: Arrival, following: Iterator[Arrival]) -> None:
        self._expect(following)
        request_id = self.recording.arrive(arrival)
        self._note("arrive", request_id)
        self._dispatch.arrive(request_id, arrival)
        if arrival.leaves_after_s is not None:
            self._events.add(self.now + arrival.leaves_after_s, partial(self._leave, request_id))
        self._send()

    def _send(self) -> None:
        """All that can go to a replica now."""
        while (sent := self._dispatch.next(self.now)) is not None:
            request_id, replica = sent
            self._note("send", request_id, replica and replica.replica_id)
            if replica is None:
                self._end(request_id, Ending.REFUSED)
                continue
            try:
                replica.add(self._request(request_id))
            except (InvalidRequest, Overloaded):
                self._end(request_id, Ending.REFUSED)
                continue
            self._homes[request_id] = replica
            if replica.step is None:
                self._begin(replica)

    def _request(self, request_id: int) -> Request:
        arrival = self.recording.records[request_id].arrival
        return Request(
            request_id=request_id,
            num_prompt_tokens=arrival.num_prompt_tokens,
            max_tokens=arrival.num_output_tokens,
            priority=arrival.priority,
            arrival=arrival.at_s,
            deadline=None if arrival.deadline_s is None else arrival.at_s + arrival.deadline_s,
            block_hashes=arrival.block_hashes,
        )

    def _begin(self, replica: Replica) -> None:
        for request_id in replica.begin(self.now):
            self._end(request_id, Ending.EXPIRED)
        step = replica.step
        if step is not None:
            schedule, load = step.schedule, step.load
            self.recording.start(schedule.started, schedule.num_cached_tokens)
            self._note("step", replica.replica_id, schedule.started, schedule.preempted, load)
            self._events.add(self.now + step.duration_s, partial(self._finish, replica, step))

    def _finish(self, replica: Replica, step: Step) -> None:
        if replica.step is not step:  # the replica has crashed since
            return
        sampled, ended = replica.finish()
        self.num_steps += 1
        self.recording.sample(self.now, sampled)
        self._dispatch.hear(replica, sampled)
        for request_id in ended:
            self._end(request_id, Ending.FINISHED)
        self._send_and_begin(replica)

    def _send_and_begin(self, replica: Replica) -> None:
        """What goes to the replica now is in its next step already."""
        self._send()
        if replica.step is None and replica.is_up:
            self._begin(replica)

    def _leave(self, request_id: int) -> None:
        if self.recording.records[request_id].ending is not None:
            return
        replica = self._homes.get(request_id)
        if replica is not None:
            replica.cancel(request_id)
        self._end(request_id, Ending.CANCELLED)

    def _break(self, fault: Stall | Crash) -> None:
        replica = self._replicas[fault.replica_index]
        self._note("fault", fault)
        if isinstance(fault, Stall):
            replica.stall(fault.duration_s)
            return
        self._dispatch.lose(replica)
        for request_id in replica.crash():
            self._end(request_id, Ending.LOST)
        self._events.add(self.now + fault.down_s, partial(self._restart, replica))

    def _restart(self, replica: Replica) -> None:
        replica.restart()
        self._send()

    def _end(self, request_id: int, ending: Ending) -> None:
        self._homes.pop(request_id, None)
        self._dispatch.forget(request_id)
        self.recording.end(self.now, request_id, ending)
        self._note("end", request_id, ending.value)

    def _note(self, *what: object) -> None:
        self._log.update(repr((self.now, *what)).encode())
